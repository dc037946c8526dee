"""OPERA (Huang et al., CVPR 2024, arXiv 2311.17911): a beam search against hallucinated answers.

It distrusts answers that attend to one of their own tokens (a "summary token") instead of the
image. Every step takes the best tokens of each beam as alternatives (`Prefix.fork`). In the
decoder's last layer it reads how each attends to the tokens of the answer. A column of these
weights that stays high is a summary token, and the product of the column lowers the candidate's
logit (section 3.3). If the same token stays the largest for long, the search goes back to it and
takes another way (section 3.4).

Shapes: R beams, C candidates of each beam, n tokens of the answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sphinx_pl.generation.beam import Hypothesis, Search
from sphinx_pl.generation.decoding import GenerationConfig, OperaConfig
from sphinx_pl.generation.prompt import Prefix, Prompt
from sphinx_pl.models.sphinx import Sphinx

# The largest penalty of a logit. A larger one changes nothing, and an infinite one would make NaN.
_MOST = math.log(1e4)


def grow_columns(logs_RCn: Tensor, weights_RCm: Tensor, scale: float) -> Tensor:
    """Return the logarithms of the column products of the (lower triangular) attention weights,
    with one more row.

    Args:
        logs_RCn: the logarithms of n columns so far, [R, 1, n] or [R, C, n].
        weights_RCm: a token's weights on the n tokens before it and on itself, [R, C, n + 1].
        scale: the factor of all weights.
    """
    logs_RCn = logs_RCn.expand(*weights_RCm.shape[:-1], -1)
    return torch.cat([logs_RCn, torch.zeros_like(weights_RCm[..., :1])], dim=-1) + (scale * weights_RCm).log()


def over_trust(logs_RCm: Tensor, window: int, damping: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the largest product of the last `window` columns times `damping`, and its column, both
    [R, C].

    A column begins at the diagonal, so products of the last columns stay inside the local window.
    """
    first = max(0, logs_RCm.shape[-1] - window)
    largest, place = logs_RCm[..., first:].max(dim=-1)
    return (largest + math.log(damping)).clamp(max=_MOST).exp(), place + first


class Retrospection:
    """Decides for one search whether to go back, and how far (section 3.4)."""

    def __init__(self, config: OperaConfig) -> None:
        self.config = config
        self.times: Counter[int] = Counter()
        """Length of an answer -> how often the search went back to answers of that length."""
        self.last = 0

    def target(self, histories: Sequence[Sequence[int]]) -> int | None:
        """Return the number of tokens of the answer to go back to, or None to continue.

        The search looks at the place where most beams have their largest column now. Every beam
        must have had its largest column there in `threshold` of its last `window_size` steps. The
        token at that place is kept, and the tokens after it are chosen again. After `max_rollbacks`
        such returns the token itself is chosen again. Places never decrease.

        Args:
            histories: for each beam, the place of the largest column in each step so far, including
                this one.
        """
        config = self.config
        place = most_common([history[-1] for history in histories])
        if place < max(config.early_tokens, self.last):
            return None
        if any(history[-config.window_size :].count(place) < config.threshold for history in histories):
            return None
        for length in (place + 1, place):
            if length < len(histories[0]) - 1 and self.times[length] < config.max_rollbacks:
                self.times[length] += 1
                self.last = place
                return length
        return None


def most_common(places: Sequence[int]) -> int:
    """Return the mode. Of several modes, it is the smallest."""
    counts = Counter(places)
    return min(counts, key=lambda place: (-counts[place], place))


@dataclass
class _BeamState:
    """A search in which all beams have the same number of tokens.

    It holds what a return needs, except the cache.
    """

    running: Sequence[Hypothesis]
    finished: Sequence[Hypothesis]
    hidden: Tensor  # [R, D]
    logs: Tensor  # [R, n], see `grow_columns`
    histories: list[list[int]]
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """The (beam, token) pairs that the search continued with."""
    rejected: set[tuple[int, int]] = field(default_factory=set)
    """The pairs among them that the search came back from."""


@torch.no_grad()
def opera_search(model: Sphinx, prompt: Prompt, limit: int, config: GenerationConfig, opera: OperaConfig) -> list[int]:
    """Return the new token ids of a prompt. The model is in eval mode.

    A candidate's score is the log-softmax over all logits, after the logits of the candidates were
    lowered. With `penalty_weights` and `max_rollbacks` 0 this is a beam search in which a beam has
    only `num_attn_candidates` continuations.
    """
    decoder, search = model.decoder, Search(limit, config)
    pieces = model.config.decoder.vocab_size
    count = min(opera.num_attn_candidates, pieces)
    prefix = Prefix(model, [prompt], limit + count)
    cache, device = prefix.cache, prefix.device
    cache.watched = model.config.decoder.layers - 1
    image_S = prefix.images_BS[0]
    retrospection = Retrospection(opera)
    nothing = torch.zeros(1, 0, dtype=torch.float64, device=device)
    states = [_BeamState(search.running, search.finished, prefix.last_BD, nothing, [[]])]
    while True:
        state = states[-1]
        logits_RV = decoder.logits(state.hidden).float()
        allowed_RV = logits_RV.clone()
        for beam, token in state.rejected:
            allowed_RV[beam, token] = -math.inf
        tokens_RC = allowed_RV.topk(count).indices
        hidden_RCD = prefix.fork(tokens_RC)
        assert cache.weights is not None
        weights_RCm, image_RC = _attention(cache.weights, prefix.length, image_S)
        logs_RCm = grow_columns(state.logs[:, None], weights_RCm, opera.scale_factor)
        penalty_RC, place_RC = over_trust(logs_RCm, opera.window_size, opera.damping)
        if logs_RCm.shape[-1] <= opera.early_tokens:
            penalty_RC = -image_RC
        places = [most_common(row) for row in place_RC.tolist()]
        histories = [[*history, place] for history, place in zip(state.histories, places, strict=True)]

        length = retrospection.target(histories)
        # Every beam needs enough remaining pieces, which only a tiny vocabulary may lack.
        if length is not None and len(states[length].rejected) + config.num_beams + count <= pieces:
            del states[length + 1 :]
            state = states[length]
            state.rejected |= set(state.chosen)
            search.running, search.finished = state.running, state.finished
            _restore(prefix, state.running)
            continue

        scores_RC = _lowered(logits_RV, tokens_RC, opera.penalty_weights * penalty_RC.float())
        scores_RC += torch.tensor([each.score for each in state.running], device=device)[:, None]
        order = scores_RC.flatten().sort(descending=True, stable=True)
        tokens = tokens_RC.flatten().tolist()
        candidates = zip(order.values.tolist(), order.indices.tolist(), strict=True)
        ranked = [(score, place // count, tokens[place]) for score, place in candidates]
        state.chosen = search.advance(ranked[: search.candidates])
        if search.done:
            return search.best
        ways = {(place // count, token): place % count for place, token in enumerate(tokens)}
        beams = torch.tensor([beam for beam, _ in state.chosen], device=device)
        choices = torch.tensor([ways[way] for way in state.chosen], device=device)
        if len(beams) == len(histories):
            cache.reorder(beams, prefix.length)
        else:
            prefix.select(beams)
        cache.keep(choices, count)
        lineages = [histories[beam] for beam, _ in state.chosen]
        states.append(
            _BeamState(search.running, search.finished, hidden_RCD[beams, choices], logs_RCm[beams, choices], lineages)
        )


def _attention(weights_RHCS: Tensor, start: int, image_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return each alternative's weights on the answer's tokens and itself [R, C, n + 1], and on the
    image [R, C].

    As in the official code, the weights are the maximum over all heads, then normalised.
    """
    weights_RCS = weights_RHCS.amax(dim=1).double()
    weights_RCS = weights_RCS / weights_RCS.sum(dim=-1, keepdim=True)
    past = weights_RCS.shape[-1] - weights_RCS.shape[1]
    itself_RC1 = weights_RCS[..., past:].diagonal(dim1=1, dim2=2)[..., None]
    image_RC = weights_RCS[..., :start][..., image_S].sum(dim=-1)
    return torch.cat([weights_RCS[..., start:past], itself_RC1], dim=-1), image_RC


def _lowered(logits_RV: Tensor, tokens_RC: Tensor, penalty_RC: Tensor) -> Tensor:
    """Return the log-probabilities [R, C] of the tokens after the penalty lowered their logits."""
    lowered_RC = logits_RV.gather(1, tokens_RC) - penalty_RC
    return logits_RV.scatter(1, tokens_RC, lowered_RC).log_softmax(dim=-1).gather(1, tokens_RC)


def _restore(prefix: Prefix, running: Sequence[Hypothesis]) -> None:
    """Restore the cache to the state with these beams, by computing it again."""
    prefix.cache.rewind(prefix.length)
    prefix.select(torch.zeros(len(running), dtype=torch.long, device=prefix.device))
    tokens_Rn = torch.tensor([hypothesis.tokens for hypothesis in running], device=prefix.device)
    if tokens_Rn.shape[1]:
        prefix.follow(tokens_Rn)
