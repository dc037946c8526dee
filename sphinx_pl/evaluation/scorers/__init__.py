"""Scorers: functions that turn one answer into a score, without a model.

`tasks` has the scorers of the project's tasks, by name. The other modules have the official rules
of benchmarks, as functions of strings, numbers and boxes. They follow a benchmark's own evaluation
literally where it is a definition. Where it guesses for the model (a random letter, the nearest
option), nothing is guessed here: an answer that cannot be read is wrong and counts as unparsed. The
parsers of answers are those of `sphinx_pl.data.answer_parsing`.

| benchmark                            | function                                                   |
|--------------------------------------|------------------------------------------------------------|
| VQAv2, OK-VQA, VizWiz                | vqa.vqa_accuracy                                           |
| TextVQA                              | vqa.textvqa_accuracy                                       |
| GQA, OCR-VQA, IconQA (filling in)    | exact.exact_match                                          |
| POPE, MME, VSR                       | yes_no.score_yes_no                                        |
| DocVQA, InfographicVQA               | anls.anls                                                  |
| ChartQA                              | chartqa.relaxed_match                                      |
| ScienceQA, IconQA, SEED-Bench        | choices.score_choice                                       |
| MMBench, CCBench                     | choices.score_choice, choices.circular                     |
| MathVista                            | mathvista.read_answer, mathvista.mathvista_match           |
| RefCOCO, RefCOCO+, RefCOCOg          | grounding.score_box                                        |
| captions (COCO, Flickr30k, NoCaps)   | caption.caption_scores                                     |
| detection, layout, poses             | coco.detection_ap, coco.keypoint_ap                        |
| their resamples                      | coco.match_boxes, resampled_ap.average_precision           |
| recognised text                      | ocr.text_similarity                                        |
"""
