"""The official metrics of benchmarks: functions of strings, numbers and boxes, without records and without a model.

A benchmark's own evaluation is followed to the letter where it is a definition; where it guesses for the model (a
random letter, the nearest option) nothing is guessed here: an answer that cannot be read counts as wrong.

| benchmark                            | function                                                   |
|--------------------------------------|------------------------------------------------------------|
| VQAv2, OK-VQA, VizWiz                | vqa.vqa_accuracy                                           |
| TextVQA                              | vqa.textvqa_accuracy                                       |
| GQA                                  | gqa.gqa_match, gqa.gqa_summary                             |
| OCR-VQA, IconQA (filling in)         | exact.exact_match                                          |
| VSR                                  | exact.vsr_match                                            |
| DocVQA, InfographicVQA               | anls.anls                                                  |
| ChartQA                              | chartqa.relaxed_match                                      |
| ScienceQA, IconQA (choices)          | choices.choice_match; choices.scienceqa_summary            |
| SEED-Bench                           | choices.choice_match, groups.mean_by                       |
| MMBench, CCBench                     | choices.choice_match, choices.circular                     |
| MathVista                            | mathvista.read_answer, mathvista.mathvista_match           |
| POPE, MME                            | yes_no.pope_scores, yes_no.mme_scores                      |
| RefCOCO, RefCOCO+, RefCOCOg          | grounding.rec_match                                        |
| captions (COCO, Flickr30k, NoCaps)   | caption.caption_scores                                     |
| detection, layout, poses             | coco.detection_ap, coco.keypoint_ap                        |
| their resamples                      | coco.match_boxes, resampled_ap.average_precision           |
| recognised text                      | ocr.text_similarity, ocr.word_match                        |
"""
