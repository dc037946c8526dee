"""Beam search: several answers grow side by side, and the most probable one wins.

The choice of beams, the end of a search and the comparison of lengths follow transformers'
`generate` with `num_beams` and its default `early_stopping=False`. Shapes: B prompts, N beams, V
pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sphinx_pl.generation.decoding import GenerationConfig, append
from sphinx_pl.generation.prompt import Prefix, Prompt
from sphinx_pl.models.sphinx import Sphinx


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """The tokens of an answer and its score, the sum of their log-probabilities.

    The score of a finished answer is divided by its length.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0


class Search:
    """The beams of one prompt.

    `running` and `finished` hold at most `num_beams` each, best first.
    """

    def __init__(self, limit: int, config: GenerationConfig) -> None:
        self.limit = limit
        self.config = config
        self.running: Sequence[Hypothesis] = [Hypothesis()]
        self.finished: Sequence[Hypothesis] = []
        self.done = False

    @property
    def candidates(self) -> int:
        """The number of candidates that `advance` needs, so that every beam can continue although
        others end.
        """
        config = self.config
        ends = (config.eos_id is not None) + len(config.stop)
        return config.num_beams * max(2, 1 + ends)

    @property
    def best(self) -> list[int]:
        """The answer, once the search is done."""
        return list(self.finished[0].tokens)

    def advance(self, candidates: Sequence[tuple[float, int, int]]) -> list[tuple[int, int]]:
        """Continue with the best candidates, and return the (beam, token) of each, which is the new
        order of the beams.

        Args:
            candidates: (sum of log-probabilities with this token, beam, token), best first.
        """
        beams, power = self.config.num_beams, self.config.length_penalty
        length = len(self.running[0].tokens) + 1
        running: list[Hypothesis] = []
        finished = list(self.finished)
        choices: list[tuple[int, int]] = []
        for rank, (score, beam, token) in enumerate(candidates):
            answer = list(self.running[beam].tokens)
            if append(answer, token, self.limit, self.config):
                if rank < beams:  # Lower ranks only fill the beams.
                    finished.append(Hypothesis(tuple(answer), score / length**power))
            elif len(running) < beams:
                running.append(Hypothesis(tuple(answer), score))
                choices.append((beam, token))
        self.finished = sorted(finished, key=lambda answer: answer.score, reverse=True)[:beams]
        full = len(self.finished) == beams
        self.done = not running or (full and running[0].score / length**power <= self.finished[-1].score)
        self.running = running
        return choices


@torch.no_grad()
def beam_search(
    model: Sphinx, prompts: Sequence[Prompt], limits: Sequence[int], config: GenerationConfig
) -> list[list[int]]:
    """Return the new token ids of each prompt, all searched in one batch of B * N rows.

    The model is in eval mode.
    """
    beams = config.num_beams
    searches = [Search(limit, config) for limit in limits]
    prefix = Prefix(model, prompts, max(limits))
    device = prefix.device
    prefix.select(torch.arange(len(prompts), device=device).repeat_interleave(beams))
    hidden_BD = prefix.last_BD
    while True:
        logp_BNV = torch.unflatten(model.decoder.logits(hidden_BD).float().log_softmax(dim=-1), 0, (-1, beams))
        sums = [[each.score for each in search.running] for search in searches]
        sums_BN = torch.tensor([row + [-math.inf] * (beams - len(row)) for row in sums], device=device)
        totals_BM = (sums_BN[..., None] + logp_BNV).flatten(1)
        best = totals_BM.topk(min(searches[0].candidates, totals_BM.shape[1]))
        pieces = logp_BNV.shape[-1]
        rows: list[int] = []
        tokens: list[int] = []
        for number, (search, scores, places) in enumerate(
            zip(searches, best.values.tolist(), best.indices.tolist(), strict=True)
        ):
            choices: list[tuple[int, int]] = []
            if not search.done:
                candidates = zip(scores, places, strict=True)
                choices = search.advance([(s, p // pieces, p % pieces) for s, p in candidates if s > -math.inf])
            choices += [(0, 0)] * (beams - len(choices))  # unused rows
            rows += [number * beams + beam for beam, _ in choices]
            tokens += [token for _, token in choices]
        if all(search.done for search in searches):
            return [search.best for search in searches]
        prefix.cache.reorder(torch.tensor(rows, device=device), prefix.length)
        hidden_BD = prefix.follow(torch.tensor(tokens, device=device)[:, None])[:, -1]
