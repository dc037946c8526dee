"""Records -> ids: what is supervised, where images stand, and that prompts are tokenized as in training."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest

from sphinx_pl.data.processor import Processor, ProcessorConfig, _overlaps, merge_questions
from sphinx_pl.data.prompt_formats import SYSTEM
from sphinx_pl.data.readers import build_reader
from sphinx_pl.data.schema import IMAGE_SLOT, ImageRef, Record, Sample, SampleQuestion, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tasks import TASKS
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.utils.errors import UserError
from tests.examples import EXAMPLES, NOT_IN_SAMPLE

SLOTS = 3  # tokens per image: few, so that expected ids can be written out


@pytest.fixture
def make(sample_data: Path):  # type: ignore[no-untyped-def]
    tokenizer = load_tokenizer(sample_data / "tokenizer.model")

    def make(position: str = "after_bos", system: str = "", max_length: int = 4096) -> Processor:
        config = ProcessorConfig(system=system, decimals=2, max_length=max_length)
        return Processor(config, tokenizer, tokens_per_image=SLOTS, image_size=32, image_position=position)

    return make


def chat(images: int, *turns: tuple[str, str]) -> Record:
    refs = tuple(ImageRef(f"{i}.jpg") for i in range(images))
    return Record("k", "chat", refs, turns=tuple(Turn(*turn) for turn in turns))


def question(sample: Sample) -> SampleQuestion:
    [only] = sample.questions
    assert sample.prefix == []
    assert len(only.ids) == len(only.supervised) == sample.length
    return only


def supervised_runs(processor: Processor, sample: Sample) -> list[str]:
    """The text of each run of supervised ids."""
    runs: list[list[int]] = []
    before = False
    for id_, flag in zip(question(sample).ids, question(sample).supervised, strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(id_)
        before = flag
    return [processor.tokenizer.decode(run) for run in runs]


def places(ids: list[int]) -> list[int]:
    """Where runs of image slots begin."""
    return [i for i, id_ in enumerate(ids) if id_ == IMAGE_SLOT and (i == 0 or ids[i - 1] != IMAGE_SLOT)]


# --- what is supervised


def test_a_sample_is_bos_image_text_with_its_answers_supervised(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    sample = processor.sample(chat(1, ("<image>\nWhat is it?", "a circle"), ("Its colour?", "red")), "s")
    text = "### Human: What is it?\n### Assistant: a circle\n### Human: Its colour?\n### Assistant: red\n###"
    assert question(sample).ids == [1, *[IMAGE_SLOT] * SLOTS, *processor.tokenizer.encode(text)]
    assert supervised_runs(processor, sample) == ["a circle\n###", "red\n###"]
    assert sample.images == (ImageRef("0.jpg"),)
    assert (sample.source, question(sample).task, question(sample).key) == ("s", "chat", "k")


def test_the_answer_is_supervised_and_not_its_copy_in_the_question(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    sample = processor.sample(chat(0, ("red\n### or red?", "red")), "s")
    flags = question(sample).supervised
    target = processor.tokenizer.encode("a red\n###")[len(processor.tokenizer.encode("a")) :]
    assert question(sample).ids[-len(target) :] == target
    assert flags == [False] * (len(flags) - len(target)) + [True] * len(target)


def test_characters_of_several_bytes_are_supervised_whole(make) -> None:  # type: ignore[no-untyped-def]
    processor = make(system=SYSTEM)
    sample = processor.sample(chat(0, ("日本? 😀", "日é😀"), ("é", "😀")), "s")
    assert supervised_runs(processor, sample) == ["日é😀\n###", "😀\n###"]
    rest = [i for i, flag in zip(question(sample).ids, question(sample).supervised, strict=True) if not flag]
    assert processor.tokenizer.decode(rest[1:]) == (
        f"{SYSTEM}\n\n### Human: 日本? 😀\n### Assistant: Human: é\n### Assistant:"
    )


def test_a_document_is_all_supervised_and_ends_with_eos(make) -> None:  # type: ignore[no-untyped-def]
    processor = make(system=SYSTEM)
    sample = processor.sample(Record("k", "text", answer="A long time ago."), "s")
    words = processor.tokenizer.encode("A long time ago.")
    assert question(sample).ids == [1, *words, 2]
    assert question(sample).supervised == [False] + [True] * (len(words) + 1)


@pytest.mark.parametrize("position", ["after_bos", "inline"])
def test_a_lone_mark_is_an_empty_question_in_one_turn_as_in_two(make, position: str) -> None:  # type: ignore[no-untyped-def]
    processor = make(position)
    one, two = ("<image>", "a red circle"), ("Sure?", "yes")
    ids = question(processor.sample(chat(1, one), "s")).ids
    assert question(processor.sample(chat(1, one, two), "s")).ids[: len(ids)] == ids
    text = processor.tokenizer.decode([i for i in ids[1:] if i != IMAGE_SLOT])
    assert "\n".join(line.rstrip() for line in text.splitlines()) == "### Human:\n### Assistant: a red circle\n###"
    assert ids[: len(processor.prompt(chat(1, one)).ids)] == processor.prompt(chat(1, one)).ids


@pytest.mark.parametrize("position", ["after_bos", "inline"])
def test_a_document_about_an_image_is_its_text_behind_the_image(make, position: str) -> None:  # type: ignore[no-untyped-def]
    processor = make(position, system=SYSTEM)
    record = Record("k", "text", (ImageRef("0.jpg"),), answer="a red circle")
    sample = processor.sample(record, "s")
    assert question(sample).ids == [1, *[IMAGE_SLOT] * SLOTS, *processor.tokenizer.encode("a red circle"), 2]
    assert question(sample).supervised == [False] * (1 + SLOTS) + [True] * (len(question(sample).ids) - 1 - SLOTS)
    assert processor.prompt(record).ids == [1, *[IMAGE_SLOT] * SLOTS]


def test_a_conversation_never_has_eos(make) -> None:  # type: ignore[no-untyped-def]
    assert make().tokenizer.eos_id not in question(make().sample(chat(0, ("Hi", "Hello")), "s")).ids


def test_a_piece_that_holds_any_character_of_an_answer_is_a_target() -> None:
    answers = ((1, 4), (7, 8))  # of "ab cd efgh": "b c" and "f"
    letters = [(0, 1), (1, 3), (3, 5), (5, 7), (7, 8), (8, 10)]
    assert _overlaps(letters, answers) == [False, True, True, False, True, False]
    assert _overlaps([(0, 2), (2, 4), (4, 10)], answers) == [True, True, True]  # pieces that begin before an answer
    assert _overlaps([(5, 7), (7, 8), (8, 9)], answers) == [False, True, False]  # pieces of " efg" alone
    assert _overlaps([(0, 0), (7, 7), (7, 8)], answers) == [False, False, True]  # BOS, and an image before an answer


# --- truncation


def test_a_long_conversation_ends_with_a_whole_turn_or_word_and_counts_what_is_lost(make) -> None:  # type: ignore[no-untyped-def]
    record = chat(1, ("What?", "a red circle"), ("And?", "a blue square"))
    processor = make()
    uncut = processor.sample(record, "s")
    whole = question(uncut)
    assert uncut.events == {}
    seen = set()
    for length in range(len(whole.ids) - 1, whole.supervised.index(True), -1):
        sample = make(max_length=length).sample(record, "s")
        cut = question(sample)
        assert len(cut.ids) <= length
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert cut.supervised == whole.supervised[: len(cut.ids)]
        assert cut.supervised[-1]  # nothing of a turn without its answer
        runs = supervised_runs(processor, sample)
        lost = {"cut": 1, "cut_targets": sum(whole.supervised) - sum(cut.supervised), "cut_turns": 2 - len(runs)}
        assert sample.events == {key: count for key, count in lost.items() if count}
        seen.add(tuple(runs))
    first = "a red circle\n###"
    assert seen == {("a",), ("a red",), ("a red circle",), (first,), (first, "a"), (first, "a blue")} | {
        (first, "a blue square")
    }
    with pytest.raises(SkipSample, match="too_long"):
        make(max_length=whole.supervised.index(True)).sample(record, "s")


def test_a_long_conversation_can_be_left_out_instead(make) -> None:  # type: ignore[no-untyped-def]
    record = chat(0, ("What?", "a red circle"))
    processor = make()
    length = processor.sample(record, "s").length
    for longest, on_too_long in ((length, "skip"), (length - 1, "cut")):
        processor.config = ProcessorConfig("", 2, longest, on_too_long)
        processor.sample(record, "s")
    processor.config.on_too_long = "skip"
    with pytest.raises(SkipSample, match=f"too_long: .*{length - 1}"):
        processor.sample(record, "s")
    document = Record("k", "text", answer="one two three four five six")
    processor.config.max_length = 4
    assert len(processor.samples(document, "s")) > 1  # nothing of it is lost


def test_the_lost_targets_of_a_very_long_answer_are_all_counted(make) -> None:  # type: ignore[no-untyped-def]
    answer = "red " * 5000
    whole = make(max_length=1 << 20).sample(chat(0, ("What?", answer.strip())), "s")
    cut = make(max_length=32).sample(chat(0, ("What?", answer.strip())), "s")
    assert cut.events["cut_targets"] == pytest.approx(whole.targets - cut.targets, abs=2)


def test_events_of_a_record_and_of_joined_samples_add_up(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    record = dataclasses.replace(chat(1, ("What?", "a\n### b")), events={"turned": 1})
    sample = processor.sample(record, "s")
    assert sample.events == {"turned": 1, "escaped": 1}
    [merged] = merge_questions([sample, processor.sample(chat(1, ("And?", "a")), "s"), sample], 4096)
    assert merged.events == {"turned": 2, "escaped": 2}


def test_a_records_own_system_text_stands_for_the_processors(make) -> None:  # type: ignore[no-untyped-def]
    processor = make(system=SYSTEM)
    record = dataclasses.replace(chat(0, ("Hi", "Hello")), system="Be brief.\n### Human: no")
    sample = processor.sample(record, "s")
    text = processor.tokenizer.decode(question(sample).ids)
    assert text == "Be brief.\n ###  Human: no\n\n### Human: Hi\n### Assistant: Hello\n###"
    assert sample.events == {"escaped": 1}
    with pytest.raises(SkipSample, match="image_in_system"):
        processor.sample(dataclasses.replace(record, system="<image>"), "s")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_too_long": "ct"}, "data.processor.on_too_long='ct': did you mean 'cut'"),
        ({"max_length": 1}, "data.processor.max_length=1 must be .* at least 2"),
        ({"system": "<image>"}, "data.processor.system holds <image>"),
    ],
)
def test_a_wrong_configuration_is_refused(make, model_config, values: dict[str, object], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        Processor.from_dict(values, make().tokenizer.path, model_config)


def test_a_document_that_is_cut_has_no_end(make) -> None:  # type: ignore[no-untyped-def]
    record = Record("k", "text", answer="one two three four")
    whole = question(make().sample(record, "s")).ids
    assert question(make(max_length=len(whole) - 1).sample(record, "s")).ids == whole[:-1]
    assert whole[-1] == 2 != whole[-2]


def test_a_cut_never_goes_through_an_image(make) -> None:  # type: ignore[no-untyped-def]
    record = chat(2, ("<image>What?", "red"), ("<image>And?", "blue"))
    whole = question(make().sample(record, "s")).ids
    asked = len(make().prompt(record).ids)
    for length in range(places(whole)[1], asked + 1):  # the second image is there before its answer begins
        with pytest.raises(SkipSample, match="too_long"):
            make(max_length=length).sample(record, "s")
    cut = question(make(max_length=len(whole) - 1).sample(record, "s"))
    assert cut.ids[: asked + 1] == whole[: asked + 1]


# --- where images stand


def test_one_image_stands_after_bos_wherever_its_mark_is(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    variants = [
        (("<image>\nWhat?", "red"), ("Why?", "so")),
        (("What?\n<image>", "red"), ("Why?", "so")),
        (("What?", "red"), ("<image> Why?", "so")),
        (("What?", "red"), ("Why?", "so")),
    ]
    samples = [question(processor.sample(chat(1, *turns), "s")).ids for turns in variants]
    assert all(ids == samples[0] for ids in samples)
    assert places(samples[0]) == [1]


def test_an_inline_image_stands_where_its_mark_is(make) -> None:  # type: ignore[no-untyped-def]
    processor = make("inline")
    encode = processor.tokenizer.encode
    ids = question(processor.sample(chat(1, ("Look: <image>what?", "red")), "s")).ids
    assert ids == [
        1,
        *encode("### Human: Look: "),
        *[IMAGE_SLOT] * SLOTS,
        *encode("what?\n### Assistant: red\n###"),
    ]


def test_several_images_stand_at_their_marks_in_both_settings(make) -> None:  # type: ignore[no-untyped-def]
    for position in ("after_bos", "inline"):
        processor = make(position)
        encode = processor.tokenizer.encode
        record = chat(2, ("<image><image>Same?", "no"))
        sample = processor.sample(record, "s")
        assert question(sample).ids == [
            1,
            *encode("### Human: "),
            *[IMAGE_SLOT] * (2 * SLOTS),
            *encode("Same?\n### Assistant: no\n###"),
        ]
        assert supervised_runs(processor, sample) == ["no\n###"]
        assert sample.images == record.images


def test_images_without_marks_are_put_in_front_of_the_first_question(make) -> None:  # type: ignore[no-untyped-def]
    with_marks = chat(2, ("<image><image>Same?", "no"), ("Why?", "size"))
    without = chat(2, ("Same?", "no"), ("Why?", "size"))
    assert question(make().sample(without, "s")).ids == question(make().sample(with_marks, "s")).ids


@pytest.mark.parametrize(
    ("position", "record", "reason"),
    [
        ("after_bos", chat(0, ("<image>What?", "red")), "image_absent"),
        ("after_bos", chat(2, ("<image>What?", "red")), "image_count"),
        ("after_bos", chat(2, ("<image><image>What?", "red"), ("<image>?", "red")), "image_count"),
        ("inline", chat(1, ("<image><image>What?", "red")), "image_count"),
        ("after_bos", chat(1, ("<image> <image>\nWhat?", "red")), "image_count"),
        ("after_bos", chat(1, ("<image>What?", "red"), ("<image>?", "red")), "image_count"),
        ("inline", chat(1, ("<image>What?", "an <image>")), "image_in_answer"),
        ("after_bos", Record("k", "short_vqa", question="What?", answer="red"), "image_absent"),
        ("after_bos", chat(0, ("What?", " ")), "answer_empty"),
    ],
)
def test_marks_that_do_not_match_the_images_are_a_bad_sample(make, position, record, reason) -> None:  # type: ignore[no-untyped-def]
    for method in (lambda: make(position).sample(record, "s"), lambda: make(position).prompt(record)):
        with pytest.raises(SkipSample) as caught:
            method()
        assert caught.value.reason == reason


def test_the_mark_is_plain_text_where_no_image_is_meant(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    sample = processor.sample(Record("k", "text", answer="Write <image> there."), "s")
    assert IMAGE_SLOT not in question(sample).ids
    assert processor.tokenizer.decode(question(sample).ids) == "Write <image> there."


# --- prompts


def records(folder: Path) -> list[Record]:
    """A few hundred records: every task, every kind of source."""
    instructions = build_reader("instructions", "tasks", str(folder / "instructions/train-*.json"))
    taken: Counter[str] = Counter()
    found = []
    for i in range(len(instructions)):
        record = instructions.record(i)
        taken[record.task] += 1
        if taken[record.task] <= 40:
            found.append(record)
    captions = build_reader("image_text", "real", str(folder / "real/train-*.tar"))
    text = build_reader("text", "text", str(folder / "text/train.jsonl"))
    return [*found, *(source.record(i) for source in (captions, text) for i in range(min(40, len(source))))]


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("position", ["after_bos", "inline"])
def test_a_prompt_is_what_the_sample_begins_with(make, sample_data: Path, position: str, system: str) -> None:  # type: ignore[no-untyped-def]
    processor = make(position, system)
    seen: Counter[str] = Counter()
    for record in records(sample_data):
        sample, prompt = question(processor.sample(record, "s")), processor.prompt(record)
        assert sample.ids[: len(prompt.ids)] == prompt.ids, record.key
        assert prompt.images == record.images
        # What the model has to say begins right there, and it is all supervised.
        assert not sample.supervised[len(prompt.ids) - 1]
        assert all(sample.supervised[len(prompt.ids) :])
        assert len(sample.ids) > len(prompt.ids)
        seen[record.task] += 1
    assert set(seen) == set(TASKS) - NOT_IN_SAMPLE
    assert sum(seen.values()) > 200


@pytest.mark.parametrize("answer", ["### no", "\n\nred", "  two  spaces", "é", "😀!", ":) :", "0.5", "###", "s Human:"])
def test_a_prompt_is_a_prefix_also_before_strange_answers(make, answer: str) -> None:  # type: ignore[no-untyped-def]
    record = chat(0, ("Hi: ", "Yes"), ("What?###", answer))
    processor = make()
    ids = processor.prompt(record).ids
    assert processor.sample(record, "s").questions[0].ids[: len(ids)] == ids
    assert ids[0] == 1
    expected = "### Human: Hi:\n### Assistant: Yes\n### Human: What?###\n### Assistant:"
    assert processor.tokenizer.decode(ids[1:]) == expected


def test_stop_sequences_are_the_end_of_every_answer(make, sample_data: Path) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    assert all(processor.tokenizer.decode(stop) == "\n###" for stop in processor.stop_sequences)
    for record in records(sample_data):
        if record.task != "text":
            ids = processor.sample(record, "s").questions[0].ids
            assert any(ids[-len(stop) :] == stop for stop in processor.stop_sequences), record.key


def test_decoding_ends_at_the_end_of_a_turn(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    assert processor.decode(processor.tokenizer.encode(" a red circle\n### Human: more")) == "a red circle"


def test_an_answer_with_a_heading_is_learned_whole_and_read_back(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    answer = "Two steps.\n### Step 1\nOpen it.\n#### Step 2"
    sample = processor.sample(chat(0, ("How?\n### Assistant: yes", answer)), "s")
    target = [i for i, flag in zip(question(sample).ids, question(sample).supervised, strict=True) if flag]
    ends = [target[n : n + len(stop)] == stop for stop in processor.stop_sequences for n in range(len(target))]
    assert sum(ends) == 1
    assert processor.decode(target) == answer
    assert processor.encode_answer(answer) == target[: len(processor.encode_answer(answer))]
    assert sample.events == {"escaped": 1}


def test_the_configuration_survives_being_saved(make, model_config) -> None:  # type: ignore[no-untyped-def]
    processor = make(system="Be brief.")
    again = Processor.from_dict(processor.to_dict(), processor.tokenizer.path, model_config)
    assert again.config == processor.config
    assert again.tokens_per_image == model_config.tokens_per_image
    with pytest.raises(UserError, match=r"data\.processor\.systm"):
        Processor.from_dict({"systm": ""}, processor.tokenizer.path, model_config)


def test_wordings_vary_with_the_random_numbers_only(make, sample_data: Path) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    record = build_reader("image_text", "real", str(sample_data / "real/train-*.tar")).record(0)
    ids = [question(processor.sample(record, "s", random.Random(i))).ids for i in range(12)]
    assert ids == [question(processor.sample(record, "s", random.Random(i))).ids for i in range(12)]
    assert len({tuple(i) for i in ids}) == len(TASKS["caption"].templates)


# --- questions of a shared prefix


def chains(sample: Sample) -> list[tuple[list[int], list[bool], str]]:
    """Each question as it would be alone."""
    return [(sample.prefix + b.ids, [False] * len(sample.prefix) + b.supervised, b.key) for b in sample.questions]


def alone(samples: list[Sample]) -> list[tuple[list[int], list[bool], str]]:
    return [chain for sample in samples for chain in chains(sample)]


def questions(processor: Processor, *questions: str, images: int = 1) -> list[Sample]:
    records = [dataclasses.replace(chat(images, (q, "red")), key=str(i)) for i, q in enumerate(questions)]
    return [processor.sample(record, "s") for record in records]


def test_joined_samples_keep_every_question_and_share_what_they_begin_with(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    samples = questions(processor, "What colour?", "What shape?", "What colour?")
    [merged] = merge_questions(samples, 4096)
    assert chains(merged) == alone(samples)
    start = [1, *[IMAGE_SLOT] * SLOTS, *processor.tokenizer.encode("### Human: What")]
    assert merged.prefix[: len(start)] == start
    assert merged.length == len(merged.prefix) + sum(len(b.ids) for b in merged.questions)
    assert (merged.images, merged.source) == (samples[0].images, "s")


def test_equal_questions_leave_the_token_before_the_first_target_to_each_question(make) -> None:  # type: ignore[no-untyped-def]
    samples = questions(make(), "What?", "What?")
    [merged] = merge_questions(samples, 4096)
    first = question(samples[0]).supervised.index(True)
    assert len(merged.prefix) == first - 1
    assert [b.supervised.index(True) for b in merged.questions] == [1, 1]


def test_inline_images_are_shared_only_if_what_stands_before_them_is(make) -> None:  # type: ignore[no-untyped-def]
    processor = make("inline")
    same = questions(processor, "<image>What colour?", "<image>What shape?")
    [merged] = merge_questions(same, 4096)
    assert merged.prefix.count(IMAGE_SLOT) == SLOTS
    assert chains(merged) == alone(same)
    different = questions(processor, "What colour? <image>", "What shape? <image>")
    assert merge_questions(different, 4096) == different
    one_of_two = questions(processor, "<image>Then <image>", "<image>Now <image>", images=2)
    assert merge_questions(one_of_two, 4096) == one_of_two


def test_the_length_bounds_what_is_joined_exactly(make) -> None:  # type: ignore[no-untyped-def]
    samples = questions(make(), "What colour?", "What shape?", "What size?")
    [whole] = merge_questions(samples, 4096)
    assert merge_questions(samples, whole.length) == [whole]
    split = merge_questions(samples, whole.length - 1)
    assert [len(s.questions) for s in split] == [2, 1]
    assert alone(split) == alone(samples)
    assert merge_questions(samples, 1) == samples
    assert merge_questions([], 10) == []


def test_questions_share_an_image_if_it_is_shown_in_one_way(make) -> None:  # type: ignore[no-untyped-def]
    plain, other = questions(make(), "What colour?", "What shape?")

    def about(sample: Sample, size: tuple[int, int] | None) -> Sample:
        return dataclasses.replace(sample, images=(dataclasses.replace(sample.images[0], annotated=size),))

    for first, second in (((4, 3), None), (None, (4, 3)), ((4, 3), (4, 3))):
        [merged] = merge_questions([about(plain, first), about(other, second)], 4096)
        assert merged.images[0].annotated == (4, 3)
    assert len(merge_questions([about(plain, (3, 4)), about(other, (4, 3))], 4096)) == 2


def test_only_coordinates_ask_for_the_annotated_size(make) -> None:  # type: ignore[no-untyped-def]
    processor = make()
    example = EXAMPLES["rec"]
    plain = dataclasses.replace(example, task="chat", question="What?", answer="a shape", regions=())
    for record, annotated in (
        (example, (100, 50)),
        (dataclasses.replace(example, turns=(Turn("Where?", "<box>(1,2),(3,4)</box>"),)), (100, 50)),
        (plain, None),
        (dataclasses.replace(plain, turns=(Turn("How many?", "Some 3 or 4."),)), None),
    ):
        assert processor.sample(record, "s").images[0].annotated == annotated
        assert processor.prompt(record).images[0].annotated == annotated
