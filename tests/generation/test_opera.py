"""OPERA: penalty and bookkeeping by hand, and whole answers beside a slow version that reads
everything again.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sphinx_pl.data.schema import IMAGE_SLOT
from sphinx_pl.generation.beam import Search
from sphinx_pl.generation.generate import GenerationConfig, OperaConfig, Prompt, generate
from sphinx_pl.generation.opera import Retrospection, grow_columns, most_common, over_trust
from sphinx_pl.generation.prompt import place_images
from sphinx_pl.models.decoder import KVCache
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError
from tests.generation.test_beam import text_model

# Weights that three tokens give to themselves and to those before them.
WEIGHTS = [[0.9], [0.5, 0.4], [0.8, 0.1, 0.05]]


def columns(rows: list[list[float]], scale: float) -> Tensor:
    logs = torch.zeros(1, 1, 0, dtype=torch.float64)
    for row in rows:
        logs = grow_columns(logs, torch.tensor([[row]], dtype=torch.float64), scale)
    return logs


def test_penalty_worked_by_hand() -> None:
    logs = columns(WEIGHTS, 2.0)
    # 1.8 * 1.0 * 1.6, 0.8 * 0.2, 0.1
    assert logs.exp()[0, 0].tolist() == pytest.approx([2.88, 0.16, 0.1])
    assert [float(x) for x in over_trust(logs, 512)] == [pytest.approx(2.88), 0]
    # The window holds the last two tokens; damping is a factor.
    assert [float(x) for x in over_trust(logs, 2)] == [pytest.approx(0.16), 1]
    assert [float(x) for x in over_trust(logs, 1, damping=0.5)] == [pytest.approx(0.05), 2]


def test_each_candidate_has_its_own_last_row() -> None:
    logs = columns(WEIGHTS[:2], 2.0)  # 1.8, 0.8
    grown = grow_columns(logs, torch.tensor([[[0.1, 0.7, 0.2], [0.6, 0.1, 0.3]]], dtype=torch.float64), 2.0)
    penalty, place = over_trust(grown, 512)
    assert penalty[0].tolist() == pytest.approx([1.12, 2.16])  # 0.8 * 1.4; 1.8 * 1.2
    assert place[0].tolist() == [1, 0]


def test_the_penalty_is_finite_and_nothing_where_no_token_is_attended_to() -> None:
    assert float(over_trust(columns([[1.0], *[[1.0, *[0.0] * i, 1.0] for i in range(80)]], 1e5), 512)[0]) == (
        pytest.approx(1e4)
    )
    assert float(over_trust(columns([[0.0]], 50.0), 512)[0]) == 0


def test_the_search_goes_back_to_a_token_that_was_a_summary_often_enough() -> None:
    search = Retrospection(OperaConfig(threshold=3, max_rollbacks=2, early_tokens=0))
    assert search.target([[0, 1, 1]]) is None
    assert search.target([[0, 1, 1, 2]]) is None  # two of them were 1, but the last one is 2
    history = [0, 1, 1, 0, 1]
    assert search.target([history]) == 2  # the answer's tokens 0 and 1 are kept
    assert search.target([history]) == 2
    assert search.target([history]) == 1  # after two times, 1 itself is chosen again
    assert search.target([history]) == 1
    assert search.target([history]) is None
    assert search.times == {2: 2, 1: 2}


def test_every_beam_must_agree_and_places_never_decrease() -> None:
    search = Retrospection(OperaConfig(threshold=3, early_tokens=0))
    long = [2, 2, 2, 2, 2, 2]
    assert search.target([long, [2, 2, 0, 0, 0, 2]]) == 3
    assert search.target([long, [0, 0, 2, 0, 2, 0]]) is None
    assert search.target([[1, 1, 1, 1]]) is None
    assert search.target([long]) == 3


def test_retrospection_looks_at_its_window_and_not_at_early_tokens() -> None:
    history = [1, 1, 1, 0, 0, 1]
    assert Retrospection(OperaConfig(threshold=3, early_tokens=0, window_size=5)).target([history]) == 2
    assert Retrospection(OperaConfig(threshold=3, early_tokens=0, window_size=3)).target([history]) is None
    assert Retrospection(OperaConfig(threshold=3, early_tokens=2)).target([history]) is None
    assert Retrospection(OperaConfig(threshold=3, early_tokens=0, max_rollbacks=0)).target([history]) is None
    # There must be something behind the place to choose again.
    assert Retrospection(OperaConfig(threshold=1, early_tokens=0)).target([[0, 1]]) is None
    assert most_common([3, 1, 3, 1, 2]) == 1


@pytest.fixture
def prompts() -> list[Prompt]:
    image = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return [Prompt([1, *[IMAGE_SLOT] * 27, 17, 20], image), Prompt([1, 40, 41, 42])]


def config(tokens: int = 8, stop: tuple[int, ...] = (), **opera: float) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens,
        num_beams=3,
        stop=[list(stop)] if stop else [],
        opera=OperaConfig(**opera),  # type: ignore[arg-type]
    )


def test_without_penalty_and_retrospection_it_is_beam_search(model: Sphinx, prompts: list[Prompt]) -> None:
    expected = generate(model, prompts, GenerationConfig(max_new_tokens=8, num_beams=3))
    off = config(num_attn_candidates=6, penalty_weights=0.0, max_rollbacks=0)
    assert generate(model, prompts, off) == expected
    stop = expected[0][4]
    off = config(8, (stop,), num_attn_candidates=12, penalty_weights=0.0, max_rollbacks=0)
    plain = GenerationConfig(max_new_tokens=8, num_beams=3, stop=[[stop]])
    assert generate(model, prompts, off) == generate(model, prompts, plain) != expected


@torch.no_grad()
def read(model: Sphinx, prompt_1PD: Tensor, answer: list[int]) -> tuple[Tensor, Tensor]:
    """Return the logits after the answer, and the last layer's weights of all positions: the
    maximum over heads.
    """
    x = torch.cat([prompt_1PD, model.decoder.embed(torch.tensor([answer], dtype=torch.long))], dim=1)
    length = x.shape[1]
    cache = KVCache(model.config.decoder.layers, length)
    cache.watched = model.config.decoder.layers - 1
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    hidden = model.decoder(x, torch.arange(length)[None], causal, cache)
    assert cache.weights is not None
    weights = cache.weights[0].amax(0).double()
    return model.decoder.logits(hidden)[0, -1], weights / weights.sum(-1, keepdim=True)


@torch.no_grad()
def slow(model: Sphinx, prompt: Prompt, given: GenerationConfig) -> tuple[list[int], int]:
    """Run OPERA without a cache. Return the answer, and how often the search went back."""
    opera = given.opera
    assert opera is not None
    search, back = Search(given.max_new_tokens, given), Retrospection(opera)
    start = len(prompt.ids)
    ids = torch.tensor([prompt.ids])
    images = ids[0] == IMAGE_SLOT
    x = place_images(model, model.decoder.embed(ids.clamp(min=0)), ids, [prompt])
    # By length: beams, finished answers, histories, choices, and choices that are excluded.
    states = [(search.running, search.finished, [[]], [], set())]  # type: ignore[var-annotated]
    while True:
        running, _, histories, chosen, rejected = states[-1]
        answers, grown = [], []
        for beam, hypothesis in enumerate(running):
            logits, _ = read(model, x, list(hypothesis.tokens))
            allowed = logits.clone()
            allowed[[token for one, token in rejected if one == beam]] = -math.inf
            places, lowered = [], logits.clone()
            tokens = allowed.topk(opera.num_attn_candidates).indices.tolist()
            for token in tokens:
                weights = read(model, x, [*hypothesis.tokens, token])[1]
                local = opera.scale_factor * weights[start:, start:]
                length = len(local)
                products = [float(local[j:, j].prod()) for j in range(length)]
                first = max(0, length - opera.window_size)
                most = max(products[first:])
                places.append(products.index(most, first))
                penalty = opera.damping * most
                if length <= opera.early_tokens:
                    penalty = -float(weights[-1, :start][images].sum())
                lowered[token] -= opera.penalty_weights * penalty
            answers += [(hypothesis.score + float(lowered.log_softmax(-1)[token]), beam, token) for token in tokens]
            grown.append([*histories[beam], most_common(places)])
        target = back.target(grown)
        if target is not None:
            del states[target + 1 :]
            states[target][4].update(states[target][3])
            search.running, search.finished = states[target][:2]
            continue
        chosen[:] = search.advance(sorted(answers, reverse=True)[: search.candidates])
        if search.done:
            return search.best, sum(back.times.values())
        states.append((search.running, search.finished, [grown[beam] for beam, _ in chosen], [], set()))


def test_penalties_are_those_of_whole_forward_passes(model: Sphinx, prompts: list[Prompt]) -> None:
    options = config(4, penalty_weights=5.0, num_attn_candidates=3, max_rollbacks=0, early_tokens=2, damping=0.01)
    assert generate(model, prompts[:1], options) == [slow(model, prompts[0], options)[0]]


@pytest.mark.parametrize("seed", range(2))
def test_going_back_takes_another_way_as_without_a_cache(seed: int) -> None:
    model, prompt = text_model(40, seed), Prompt([1, 30, 31])
    options = config(
        8, num_attn_candidates=3, early_tokens=0, threshold=3, max_rollbacks=2, damping=1e-3, window_size=5
    )
    answer, times = slow(model, prompt, options)
    assert times > 1
    assert generate(model, [prompt], options) == [answer]
    never = config(8, num_attn_candidates=3, early_tokens=0, max_rollbacks=0, damping=1e-3, window_size=5)
    assert generate(model, [prompt], never) == [slow(model, prompt, never)[0]] != [answer]


def test_a_vocabulary_that_is_all_candidates_is_never_used_up() -> None:
    options = config(6, num_attn_candidates=10, early_tokens=0, threshold=1, max_rollbacks=5)
    assert len(generate(text_model(8, 0), [Prompt([1])], options)[0]) == 6


def test_settings_that_cannot_be_are_one_line() -> None:
    with pytest.raises(UserError, match=r"set generation\.num_beams, to 5"):
        GenerationConfig(opera=OperaConfig())
    with pytest.raises(UserError, match="num_attn_candidates=1 must be at least 2"):
        OperaConfig(num_attn_candidates=1)
    with pytest.raises(UserError, match="damping=0"):
        OperaConfig(damping=0)
