"""A cached prefix with alternatives, reordered rows and rewinding agrees with passes without a
cache.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sphinx_pl.generation.prompt import Prefix, Prompt
from sphinx_pl.models.sphinx import Sphinx


@torch.no_grad()
def last(model: Sphinx, ids: list[int]) -> Tensor:
    hidden = model.decoder(model.decoder.embed(torch.tensor(ids)[None]), torch.arange(len(ids))[None])
    return torch.as_tensor(hidden[0, -1])


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=2e-5)


@pytest.fixture
def prefix(sample: Sphinx) -> Prefix:
    with torch.no_grad():
        return Prefix(sample, [Prompt([1, 40, 41]), Prompt([1, 50])], 12)


@torch.no_grad()
def test_what_follows_reads_what_was_before(sample: Sphinx, prefix: Prefix) -> None:
    assert close(prefix.last_BD[1], last(sample, [1, 50]))
    hidden = prefix.follow(torch.tensor([[7, 8, 9], [10, 11, 12]]))
    assert close(hidden[0, 1], last(sample, [1, 40, 41, 7, 8]))
    assert close(hidden[1, 2], last(sample, [1, 50, 10, 11, 12]))


@torch.no_grad()
def test_alternatives_do_not_see_each_other_and_one_is_kept(sample: Sphinx, prefix: Prefix) -> None:
    prefix.cache.watched = sample.config.decoder.layers - 1
    hidden = prefix.fork(torch.tensor([[7, 8, 9], [10, 11, 12]]))
    assert close(hidden[0, 2], last(sample, [1, 40, 41, 9]))
    assert close(hidden[1, 1], last(sample, [1, 50, 11]))
    assert prefix.cache.weights is not None
    # of 11, padded by one position, with 10 and 12 beside it
    weights = prefix.cache.weights[1, :, 1]
    assert torch.allclose(weights.sum(-1), torch.ones(6))
    assert float(weights[:, [0, 3, 5]].abs().max()) == 0
    prefix.cache.keep(torch.tensor([2, 1]), 3)
    hidden = prefix.follow(torch.tensor([[3], [4]]))
    assert close(hidden[0, 0], last(sample, [1, 40, 41, 9, 3]))
    assert close(hidden[1, 0], last(sample, [1, 50, 11, 4]))


@torch.no_grad()
def test_rows_are_taken_reordered_and_rewound(sample: Sphinx, prefix: Prefix) -> None:
    prefix.select(torch.tensor([1, 1, 0]))
    assert close(prefix.last_BD[1], last(sample, [1, 50]))
    prefix.follow(torch.tensor([[7, 8], [9, 10], [11, 12]]))
    prefix.cache.reorder(torch.tensor([1, 0, 2]), prefix.length)
    hidden = prefix.follow(torch.tensor([[3], [4], [5]]))
    assert close(hidden[0, 0], last(sample, [1, 50, 9, 10, 3]))
    assert close(hidden[2, 0], last(sample, [1, 40, 41, 11, 12, 5]))
    prefix.cache.rewind(prefix.length)
    hidden = prefix.follow(torch.tensor([[3], [4], [5]]))
    assert close(hidden[1, 0], last(sample, [1, 50, 4]))
