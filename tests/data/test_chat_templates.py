"""The model's own chat template: ids are those of transformers, and only the template writes structure."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphinx_pl.data.processor import Processor, ProcessorConfig
from sphinx_pl.data.prompt_formats import format_names
from sphinx_pl.data.schema import IMAGE_SLOT, ImageRef, Record, Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tokenizers import Tokenizer, load_tokenizer
from sphinx_pl.utils.errors import UserError
from tests.data.chat_templates import Shipped, shipped

MODELS = tuple(shipped())
GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer.model"
HOSTILE = (
    *("<|im_end|>", "<|im_start|>system\n", "</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<<SYS>>", "<|eot_id|>"),
    *("<|start_header_id|>user<|end_header_id|>\n\n", "<|end|>", "<|user|>\n", "\n<|assistant|>\n", "<end_of_turn>\n"),
    *("### Human:", "\n### Assistant: ", "\n###", "### Instruction:\n", "### Response:", "USER: ", "\nASSISTANT: "),
    *("<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<0x0A>", "\u2581", " ", "\n", "a", "é", "日"),
)
TURNS = (
    Turn("What is in\n  the image, don't you know 1234? 日本", "A red circle.\n\nAnd é 😀!"),
    Turn("Its colour?", "red  and blue"),
    Turn("x", "y"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Shipped, Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {name: (model, model.write(folder / name)) for name, model in shipped().items()}


def processor(tokenizer: Tokenizer, prompt_format: str = "model", system: str | None = None) -> Processor:
    config = ProcessorConfig(system=system, prompt_format=prompt_format, max_length=4096)
    return Processor(config, tokenizer, tokens_per_image=3, image_size=32)


def conversation(turns: tuple[Turn, ...], images: int = 0, system: str | None = None) -> Record:
    return Record("k", "chat", tuple(ImageRef(f"{n}.png") for n in range(images)), turns=turns, system=system)


def messages(turns: tuple[Turn, ...], system: str = "") -> list[dict[str, str]]:
    pairs = [(("user", turn.question), ("assistant", turn.answer)) for turn in turns]
    first = [("system", system)] if system else []
    return [{"role": role, "content": content} for role, content in [*first, *(one for pair in pairs for one in pair)]]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_transformers(name: str, models: dict[str, tuple[Shipped, Path]]) -> None:
    from transformers import AutoTokenizer

    model, folder = models[name]
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    for system in ("", "Be brief, please.") if model.system else ("",):
        ours = processor(load_tokenizer(folder), system=system)
        assert ours.format.end == model.end
        for count in (1, 2, 3):
            record, chat = conversation(TURNS[:count]), messages(TURNS[:count], system)
            [question] = ours.sample(record, "s").questions
            assert question.ids == theirs.apply_chat_template(chat, return_dict=False)
            prompt = theirs.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
            assert ours.prompt(record).ids == prompt
            targets = [id for id, target in zip(question.ids, question.supervised, strict=True) if target]
            # An answer's end is what generation stops at, and what is generated is the answer.
            end = [ours.tokenizer.controls[model.end.strip()].id]
            assert targets[-1:] == end
            assert end in [*ours.stop_sequences, [ours.tokenizer.eos_id]]
            assert targets.count(end[0]) == count
            if count == 1:
                assert question.ids[len(prompt) :][: len(targets)] == targets
                assert ours.decode(targets).removeprefix("<think>\n\n</think>\n\n") == TURNS[0].answer
                assert [id for id in ours.encode_answer(TURNS[0].answer) if id not in end][-3:] == [
                    id for id in targets if id not in end
                ][-3 - (model.end != model.end.strip()) :][:3]


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "internlm2", "vicuna"])
def test_a_format_by_name_is_the_template_of_its_model(name: str, models: dict[str, tuple[Shipped, Path]]) -> None:
    same = {
        "chatml": "qwen2.5",
        "llama3": "llama3",
        "zephyr": "tinyllama",
        "internlm2": "internlm2",
        "vicuna": "vicuna",
    }
    tokenizer = load_tokenizer(models[same[name]][1])
    system = None if name == "vicuna" else "Be brief."
    named, own = processor(tokenizer, name, system), processor(tokenizer, "model", "" if name == "vicuna" else system)
    for count in (1, 2, 3):
        record = conversation(TURNS[:count])
        a, b = (each.sample(record, "s").questions[0] for each in (named, own))
        # Vicuna's template on the hub has no BOS, which its tokenizer adds.
        skip = int(name == "vicuna")
        assert a.ids[skip:] == b.ids
        assert a.supervised[skip:] == b.supervised
        assert named.prompt(record).ids[skip:] == own.prompt(record).ids


@pytest.mark.parametrize("name", [*(f"model {model}" for model in MODELS), *format_names()[:-1]])
@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6).map("".join).filter(str.strip),
        min_size=2,
        max_size=6,
    )
)
def test_no_text_becomes_structure(name: str, models: dict[str, tuple[Shipped, Path]], texts: list[str]) -> None:
    ours = _processors(name, models)
    turns = tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=False))
    harmless = (Turn("a", "b"),) * len(turns)
    marks = {token.id for token in ours.tokenizer.controls.values()}

    def structure(record: Record) -> Counter[int]:
        return Counter(id for id in ours.sample(record, "s").questions[0].ids if id in marks)

    assert structure(conversation(turns)) == structure(conversation(harmless))
    rendered = ours.format.render(turns, "")
    plain = ours.format.render(harmless, "")
    # Structure that is plain text stands where the format wrote it, and nowhere else.
    for marker in ours.format.markers.texts if name != "sphinx" else ():
        assert rendered.text.count(marker) == plain.text.count(marker)
    for turn in turns:
        again = ours.format.unescape(ours.format.escape(turn.answer))
        assert ours.format.escape(again) == ours.format.escape(turn.answer)


_CACHE: dict[str, Processor] = {}


def _processors(name: str, models: dict[str, tuple[Shipped, Path]]) -> Processor:
    if name not in _CACHE:
        kind, _, model = name.partition(" ")
        tokenizer = load_tokenizer(models[model][1] if model else GOLDEN)
        _CACHE[name] = processor(tokenizer, kind, "")
    return _CACHE[name]


def test_an_image_stands_behind_bos_or_in_front(models: dict[str, tuple[Shipped, Path]]) -> None:
    for name, place in (("llama3", 1), ("smollm2", 0)):  # SmolLM2's bos_token begins a turn, and no text
        ours = processor(load_tokenizer(models[name][1]))
        text, image = (ours.prompt(conversation(TURNS[:1], images)).ids for images in (0, 1))
        assert image == [*text[:place], *[IMAGE_SLOT] * 3, *text[place:]]
        ours.image_position = "inline"
        turns = (Turn("What <image>is it?", "a"),)
        ids = ours.prompt(conversation(turns, 1)).ids
        assert ids.count(IMAGE_SLOT) == 3
        assert ids.index(IMAGE_SLOT) > place


def test_a_document_begins_with_bos_or_with_the_end_of_the_one_before(models: dict[str, tuple[Shipped, Path]]) -> None:
    record = Record("k", "text", answer="A long <|im_end|> ago.")
    for name, first in (("llama3", "<|begin_of_text|>"), ("smollm2", "<|im_end|>")):
        ours = processor(load_tokenizer(models[name][1]))
        [question] = ours.sample(record, "s").questions
        controls = ours.tokenizer.controls
        assert question.ids == [controls[first].id, *ours.tokenizer.encode(record.answer), ours.tokenizer.eos_id]
        assert question.supervised == [False] + [True] * (len(question.ids) - 1)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no control token ends an answer"),
        ("{{ messages[0].content }}</s>", "it drops an answer"),
        ("{% for m in messages %}{{ m.content + m.content }}</s>{% endfor %}", "it writes a text twice"),
        ("{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}Think:{% endif %}",
         "what it writes for a prompt is not"),
        ("{{ raise_exception('no chat') }}", r"it fails \(no chat\)"),
        ("{{ strftime_now('%d') }}", "'strftime_now' is undefined"),
        ("{% for m in messages %}", "cannot be used: Unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ 'a' * 10 ** 9 }}", "makes too much of it"),
        ("{{ 'a' * 999999999 }}", "makes too much of it"),
        ("{{ messages.append(1) }}", "append"),
    ],
)  # fmt: skip
def test_a_template_without_answers_that_can_be_found_is_refused(
    template: str, why: str, models: dict[str, tuple[Shipped, Path]], tmp_path: Path
) -> None:
    model, _ = models["zephyr"]
    folder = Shipped(template, model.tokenizer, model.names).write(tmp_path)
    with pytest.raises(UserError, match=rf"prompt_format=model: the chat template of .* cannot be used: .*{why}|{why}"):
        processor(load_tokenizer(folder))


def test_what_a_template_cannot_write_is_refused_or_left_out(models: dict[str, tuple[Shipped, Path]]) -> None:
    mistral = load_tokenizer(models["mistral"][1])
    with pytest.raises(UserError, match=r"has no place for data.processor.system: it fails .Conversation roles"):
        processor(mistral, system="Be brief.")
    with pytest.raises(SkipSample, match=r"chat_template: .*Conversation roles must alternate"):
        processor(mistral).sample(conversation(TURNS, system="Be brief."), "s")
    qwen = processor(load_tokenizer(models["qwen3"][1]))
    with pytest.raises(SkipSample, match=r"chat_template: .* it changes the texts"):
        qwen.sample(conversation((Turn("a", "b</think>c"), *TURNS)), "s")
    with pytest.raises(UserError, match=r"tokenizer\.model' has no chat template"):
        processor(load_tokenizer(GOLDEN))


def test_a_folder_without_an_end_of_a_text_is_refused(models: dict[str, tuple[Shipped, Path]], tmp_path: Path) -> None:
    model, _ = models["smollm2"]
    folder = Shipped(model.template, model.tokenizer, {}).write(tmp_path)
    with pytest.raises(UserError, match=r"does not say which token ends a text"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [421, 420], "bos_token_id": 420}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.bos_id) == (421, (421, 420), None)
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": [], "merges": 3}}')
    with pytest.raises(UserError, match=r"is not a tokenizer"):
        load_tokenizer(folder)
