"""The registered tasks, each with its wordings.

The first wording of a task is the one of evaluation. Where the original's demo or evaluation has a
prompt, the first wording is that prompt, or ours in its style; the others are ours.
"""

from __future__ import annotations

from sphinx_pl.data.tasks.readers import (
    read_boxes,
    read_choice,
    read_detection,
    read_grounded,
    read_grounded_answer,
    read_keypoints,
    read_lines,
    read_ocr,
    read_text,
    read_yes_no,
)
from sphinx_pl.data.tasks.task import LINES, WHOLE, add_task
from sphinx_pl.data.tasks.writers import (
    write_answer,
    write_choice,
    write_detection,
    write_grounded_caption,
    write_grounded_vqa,
    write_groups,
    write_ocr,
    write_ocr_text,
    write_pose,
    write_question,
    write_questions,
    write_rec,
    write_reg,
    write_relation,
    write_yes_no,
)

add_task(
    "short_vqa",
    write_question,
    read_text,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
    parts=WHOLE,
)
add_task(
    "relation",
    write_question,
    read_text,
    "vqa_exact",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nGive a short answer.",
    parts=WHOLE,
)
add_task(
    "multiple_choice",
    write_choice,
    read_choice,
    "choice",
    10,
    "{question}\n{choices}\nAnswer with the option's letter from the given choices directly.",
    "{question}\n{choices}\nReply with the letter of the right option.",
    parts=WHOLE,
)
add_task(
    "description",
    write_answer,
    read_text,
    "caption_f1",
    256,
    "Generate a detailed description about the image.",
    "Describe this image in detail.",
    "What is in this image? Tell me everything that you see.",
)
add_task(
    "caption",
    write_answer,
    read_text,
    "caption_f1",
    64,
    "Provide a one-sentence caption for the provided image.",
    "Describe the image in one sentence.",
    "Write a short caption for this image.",
)
add_task(
    "rec",
    write_rec,
    read_boxes,
    "box_iou50",
    30,
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
    "Where is {phrase}? Answer with its bounding box.",
    parts=WHOLE,
)
add_task(
    "reg",
    write_reg,
    read_text,
    "text_exact",
    32,
    "Please provide a short description for this region: {box}.",
    "What is in the region {box}? Describe it briefly.",
    parts=WHOLE,
)
add_task(
    "grounded_caption",
    write_grounded_caption,
    read_grounded_answer,
    "grounded_f1",
    256,
    "Describe the image concisely. Include the bounding box for each mentioned object.",
    "Give a brief description of the image with the bounding box of every object that you mention.",
)
add_task(
    "detection",
    write_detection,
    read_detection,
    "detection_f1",
    256,
    "Detect all {label} shown in the image.",
    "Find every {label} in the image and give the bounding boxes.",
    parts=WHOLE,
)
add_task(
    "ocr",
    write_ocr,
    read_ocr,
    "ocr_exact",
    256,
    "Please detect all texts and provide their bounding box coordinate.",
    "Read all the text in the image and give the bounding box of each piece.",
)
add_task(
    "pose",
    write_pose,
    read_keypoints,
    "keypoint_pck",
    512,
    "Detect the key points of the person in the region {box}.",
    "Where are the body key points of the person in {box}?",
    given_slot="person",
    given=("Detect the key points of {person}.", "Where are the body key points of {person}?"),
)
add_task(
    "layout",
    write_groups,
    read_grounded,
    "grounded_f1",
    256,
    "Detect the layout elements of this page and provide their bounding box coordinate.",
    "Which parts does this page have? Give the bounding boxes of each kind.",
)
add_task("chat", write_question, read_text, "vqa_exact", 256, "{question}", needs_image=False)
# A document of plain text: no instruction, and all of it is supervised.
add_task("text", lambda record, coordinates: ({}, record.answer), read_text, "none", 64, "", needs_image=False)

# New tasks come last: a task's number in a batch is its place here.
add_task(
    "yes_no",
    write_yes_no,
    read_yes_no,
    "yes_no",
    10,
    "{question}\nAnswer the question using a single word or phrase.",
    "{question}\nPlease answer yes or no.",
    parts=WHOLE,
)
add_task(
    "detailed_answer",
    write_question,
    read_text,
    "caption_f1",
    512,
    "{question}\nAnswer the question in detail.",
    "{question}\nGive a long answer and explain it.",
)
add_task(
    "grounded_vqa",
    write_grounded_vqa,
    read_grounded_answer,
    "grounded_answer",
    256,
    "{question}\nInclude the bounding box for each mentioned object.",
    "{question}\nGive the bounding box of every object that you mention.",
)
add_task(
    "detection_all",
    write_groups,
    read_grounded,
    "grounded_f1",
    512,
    "Detect all objects shown in the image.",
    "Which objects are in the image? Give the bounding boxes of each kind.",
)
add_task(
    "ocr_text",
    write_ocr_text,
    read_lines,
    "edit_similarity",
    512,
    "Please detect all texts.",
    "Read all the text in the image, one piece on each line.",
    parts=LINES,
)
add_task(
    "relation_detection",
    write_relation,
    read_text,
    "vqa_exact",
    16,
    "What is the relation between {subject} and {object}?\nAnswer the question using a single word or phrase.",
    "How does {subject} relate to {object}? Give a short answer.",
    parts=WHOLE,
)
add_task(
    "question_generation",
    write_questions,
    read_text,
    "caption_f1",
    128,
    "Ask a question about the image.",
    "What could one ask about this image?",
    given_slot="answer",
    given=(
        "Ask a question about the image that has this answer: {answer}",
        "Which question about this image is answered by: {answer}",
    ),
    parts=LINES,
)
