"""Beam search agrees with an exhaustive search and with transformers, and batches do not matter."""

from __future__ import annotations

import itertools

import pytest
import torch

from perf.generation import theirs
from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.generate import GenerationConfig, Prompt, generate, stream
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError

EOS = 2


def text_model(vocab: int, seed: int) -> Sphinx:
    torch.manual_seed(seed)
    decoder = DecoderConfig(vocab, width=16, layers=2, heads=4, kv_heads=2, ffn_width=32, max_positions=32)
    model = Sphinx(SphinxConfig(decoder=decoder, vision=None)).eval()
    # sharper than the initial weights, which say nearly the same of every token
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.6)
    return model


@torch.no_grad()
def exhaustive(model: Sphinx, prompt: list[int], limit: int, power: float) -> list[int]:
    """Return the best of all answers that end with eos or at the limit."""
    vocab = model.config.decoder.vocab_size
    best: tuple[float, list[int]] = (-float("inf"), [])
    for length in range(1, limit + 1):
        for answer in itertools.product(range(vocab), repeat=length):
            if EOS in answer[:-1] or (length < limit and answer[-1] != EOS):
                continue
            ids = torch.tensor([*prompt, *answer])[None]
            hidden = model.decoder(model.decoder.embed(ids), torch.arange(ids.shape[1])[None])
            logp = model.decoder.logits(hidden)[0].log_softmax(dim=-1)
            total = sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            best = max(best, (total / length**power, [token for token in answer if token != EOS]))
    return best[1]


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_enough_beams_find_the_optimum(seed: int, power: float) -> None:
    model, prompts = text_model(4, seed), [[1, 3], [0, 1, 3, 3]]
    expected = [exhaustive(model, ids, 3, power) for ids in prompts]
    config = GenerationConfig(max_new_tokens=3, num_beams=16, length_penalty=power, eos_id=EOS)
    assert generate(model, [Prompt(ids) for ids in prompts], config) == expected


def test_the_length_penalty_decides_between_short_and_long() -> None:
    def lengths(power: float) -> list[int]:
        config = GenerationConfig(max_new_tokens=8, num_beams=4, length_penalty=power, eos_id=EOS)
        return [len(generate(text_model(4, seed), [Prompt([1, 3])], config)[0]) for seed in range(6)]

    short, long = lengths(-2.0), lengths(3.0)
    assert all(a <= b for a, b in zip(short, long, strict=True))
    assert sum(short) < sum(long)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_answers_are_those_of_transformers(seed: int, power: float) -> None:
    pytest.importorskip("transformers")
    model = text_model(24, seed)
    ids = torch.randint(3, 24, (3, 5))
    answers = generate(
        model,
        [Prompt(row) for row in ids.tolist()],
        GenerationConfig(max_new_tokens=10, num_beams=4, length_penalty=power, eos_id=EOS),
    )
    out = theirs(model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=10,
        num_beams=4,
        length_penalty=power,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    ends = [row.index(EOS) if EOS in row else len(row) for row in out[:, 5:].tolist()]
    assert answers == [row[:end] for row, end in zip(out[:, 5:].tolist(), ends, strict=True)]


@pytest.fixture
def prompts() -> list[Prompt]:
    image = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Prompt([1, *[IMAGE_SLOT] * 27, 17, 20], image), Prompt([1, 40, 41, 42]), Prompt([1], max_new_tokens=3)]


def test_a_batch_answers_as_each_alone(model: Sphinx, prompts: list[Prompt]) -> None:
    config = GenerationConfig(max_new_tokens=8, num_beams=3)
    answers = generate(model, prompts, config)
    assert [len(answer) for answer in answers] == [8, 8, 3]
    assert [generate(model, [prompt], config)[0] for prompt in prompts] == answers
    assert answers != generate(model, prompts, GenerationConfig(max_new_tokens=8))


def test_one_beam_is_greedy(model: Sphinx, prompts: list[Prompt]) -> None:
    greedy = generate(model, prompts, GenerationConfig(max_new_tokens=8))
    assert generate(model, prompts, GenerationConfig(max_new_tokens=8, num_beams=1, length_penalty=3.0)) == greedy


def test_a_stop_sequence_ends_an_answer_as_eos_does(model: Sphinx, prompts: list[Prompt]) -> None:
    full = generate(model, prompts[:1], GenerationConfig(max_new_tokens=8, num_beams=3))[0]
    # With a high power for short answers the first one that ends is the best: the same beams, cut.
    config = GenerationConfig(max_new_tokens=8, num_beams=3, length_penalty=-20.0, stop=[full[2:4], [511, 511]])
    assert generate(model, prompts[:1], config)[0] == full[:2]
    ends, stops = (
        GenerationConfig(max_new_tokens=8, num_beams=3, length_penalty=-20.0, **by)
        for by in ({"eos_id": full[3]}, {"stop": [full[3:4]]})
    )
    assert generate(model, prompts[:1], ends) == generate(model, prompts[:1], stops) != [full]


def test_a_search_is_streamed_once_at_its_end(model: Sphinx, prompts: list[Prompt]) -> None:
    config = GenerationConfig(max_new_tokens=4, num_beams=2)
    assert list(stream(model, prompts, config)) == [generate(model, prompts, config)]


def test_settings_that_do_not_fit_together_are_one_line() -> None:
    with pytest.raises(UserError, match="num_beams=0"):
        GenerationConfig(num_beams=0)
    with pytest.raises(UserError, match="set num_beams=1 or temperature=0"):
        GenerationConfig(num_beams=2, temperature=0.5)
