"""Every task's answer parses back to its annotation, as far as it is supervised after it was cut."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import pytest

from sphinx_pl.data.coordinates import COCO_KEYPOINTS, Coordinates
from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import SPHINX
from sphinx_pl.data.schema import Record, Region, Sample, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS, WHOLE, choice_letter
from sphinx_pl.data.tokenizers import Tokenizer, load_tokenizer
from tests.examples import EXAMPLES

WORDS = (
    "red",
    "square",
    "12.5",
    "a [1]",
    "b (two)",
    "3,000",
    "it's",
    "é",
    "日本",
    "### x",
    "\n### y",
    "<s>",
    "{9}",
    "half-way",
)
SIZE = (100, 50)


@pytest.fixture(scope="module", params=["sample", "golden"])
def tokenizer(sample_data: Path, request: pytest.FixtureRequest) -> Tokenizer:
    folders = {"sample": sample_data, "golden": Path(__file__).parents[1] / "golden"}
    return load_tokenizer(folders[request.param] / "tokenizer.model")


def processor(tokenizer: Tokenizer, longest: int) -> Processor:
    return Processor(ProcessorConfig("", 3, longest), tokenizer, tokens_per_image=3, image_size=32)


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most))).strip()


def region(rng: random.Random, label: str) -> Region:
    x1, y1 = rng.uniform(0, 80), rng.uniform(0, 40)
    box = (x1, y1, rng.uniform(x1 + 1, 100), rng.uniform(y1 + 1, 50))
    points = tuple((rng.uniform(0, 100), rng.uniform(0, 50), rng.randint(0, 2)) for _ in COCO_KEYPOINTS)
    return Region(box, label, (*points[:-1], (5.0, 5.0, 2)))


def random_record(task: str, rng: random.Random) -> Record:
    labels = [words(rng, 2).replace("{9}", "z") for _ in range(3)]
    regions = tuple(region(rng, rng.choice(labels)) for _ in range(rng.randint(2, 6)))
    fields = {"question": words(rng, 4), "answer": words(rng, 8), "regions": regions}
    if task in ("grounded_caption", "grounded_vqa"):
        mentions = " ".join(f"{words(rng, 2)} {{{i}}}" for i in range(len(regions))).replace("{9}", "z")
        fields["answer"] = f"{mentions} {{0,1}}."
    elif task == "detection":
        fields["question"] = regions[0].label
    elif task == "yes_no":
        fields["answer"] = rng.choice(("yes", "no"))
    elif task == "multiple_choice":
        fields |= {"choices": ("one", "two", "three"), "answer": "two"}
    return dataclasses.replace(EXAMPLES[task], sizes=(SIZE,), **fields)


def answer_ids(sample: Sample) -> list[int]:
    """What the sample teaches to say."""
    [question] = sample.questions
    return [i for i, flag in zip(question.ids, question.supervised, strict=True) if flag]


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"text"}))
def test_what_is_supervised_parses_back_to_the_first_part_of_the_annotation(task: str, tokenizer: Tokenizer) -> None:
    parse, coordinates = TASKS[task].parse, processor(tokenizer, 9).coordinates
    cuts, left_out = 0, set()
    for seed in range(6):
        record = random_record(task, random.Random(f"{task} {seed}"))
        [turn] = TASKS[task].turns(record, coordinates)
        whole, annotated = processor(tokenizer, 1 << 20), parse(turn.answer, coordinates)
        uncut = whole.sample(record, "s")
        assert whole.decode(answer_ids(uncut)) == turn.answer
        shortest = uncut.length - uncut.targets
        for longest in range(shortest + seed, uncut.length, 1 + uncut.targets // 20):
            cut = processor(tokenizer, longest)
            try:
                sample = cut.sample(record, "s")
            except SkipSample as bad:
                left_out.add(bad.reason)
                continue
            assert sample.length <= longest
            assert sample.events["cut"] == 1
            # Where text is far beyond the limit, what is lost is counted without the context of what is kept.
            assert sample.events["cut_targets"] == pytest.approx(uncut.targets - sample.targets, abs=8)
            assert sample.events["cut_targets"] > 0
            ids = answer_ids(sample)
            assert SPHINX.end not in cut.tokenizer.decode(ids)
            part = cut.decode(ids)
            assert turn.answer.startswith(part)
            assert part
            rest = turn.answer[len(part) :]
            if TASKS[task].parts is WHOLE:
                assert not rest
            assert not re.match(r"\w", rest) or not re.search(r"[\w.]$", part), (part, rest)  # no half number or word
            assert all(part.count(a) == part.count(b) for a, b in ("[]", "()")), part
            assert part.count("<p>") == part.count("</p>")
            parsed = parse(part, coordinates)
            assert parsed.places == annotated.places[: len(parsed.places)]
            cuts += 1
    assert cuts > 0
    assert left_out <= {"too_long"}


@pytest.mark.parametrize(
    "answer",
    [
        "It is at (0.1, 0.2), (0.3, 0.4) and there",
        "<ref>a dog</ref><box>(12,34),(56,78)</box> sits",
        '{"bbox_2d": [12, 34, 56, 78], "label": "dog"} and',
        "[[0.1, 0.2], [0.3, 0.4]] it is",
        "[0.123 0.456 0.789 0.999] it is",
    ],
)
def test_places_in_other_notations_are_not_cut_through_either(tokenizer: Tokenizer, answer: str) -> None:
    record = Record("k", "chat", turns=(Turn("Where?", f"Look. {answer}"),))
    uncut = processor(tokenizer, 1 << 20).sample(record, "s")
    for longest in range(uncut.length - uncut.targets + 4, uncut.length):
        try:
            text = tokenizer.decode(answer_ids(processor(tokenizer, longest).sample(record, "s")))
        except SkipSample:
            continue
        assert all(text.count(a) == text.count(b) for a, b in ("[]", "()", "{}")), text
        assert len(re.findall(r"<\w+>", text)) == len(re.findall(r"</\w+>", text))


@pytest.mark.parametrize(
    ("choices", "answer", "reason"),
    [
        (("cat", "dog", "cat"), "cat", "choices_repeated"),
        (("cat", "dog", "dog "), "cat", "choices_repeated"),
        (("cat", " "), "cat", "choice_empty"),
        (("cat", "dog"), "cow", "answer_not_in_choices"),
        ((), "cow", "choices_count"),
    ],
)
def test_choices_that_have_no_one_answer_are_refused_in_training_and_when_they_are_asked(
    tokenizer: Tokenizer, choices: tuple[str, ...], answer: str, reason: str
) -> None:
    record = dataclasses.replace(EXAMPLES["multiple_choice"], choices=choices, answer=answer)
    made = processor(tokenizer, 4096)
    for method in (lambda: choice_letter(record), lambda: made.sample(record, "s"), lambda: made.prompt(record)):
        with pytest.raises(SkipSample) as caught:
            method()
        assert caught.value.reason == reason


def test_a_label_with_a_mark_for_an_image_is_refused() -> None:
    record = dataclasses.replace(EXAMPLES["ocr"], regions=(Region((1, 2, 30, 40), "see <image> 1"),))
    with pytest.raises(SkipSample, match="label_markup"):
        TASKS["ocr"].turns(record, Coordinates())
