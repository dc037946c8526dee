"""Log-likelihoods of given answers: of one answer to each prompt, or of the choices of multiple
choice.

Shapes: B prompts, R answers of all of them, T tokens of the longest row, M tokens of all answers, V
pieces, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinx_pl.generation.prompt import Prefix, Prompt, check_prompts, place_images
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


@torch.no_grad()
def answer_loglikelihoods(
    model: Sphinx, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """The log-probability of each answer to its prompt, and whether every token is the most likely
    one.

    It is the sum over the answer's tokens, in nats and float32. All pairs are one batch and one
    forward pass without a cache. Rows are padded on the right, where nothing attends to the
    padding. The model keeps its mode.

    Raises:
        UserError: an empty answer, slots that do not match the images, or a prompt with an answer
            too long for the decoder.
    """
    if not prompts:
        return []
    lengths = [len(answer) for answer in answers]
    if not all(lengths):
        raise UserError(f"answer {lengths.index(0)} has no token: there is nothing to score")
    check_prompts(model, prompts, lengths)
    was_training = model.training
    model.eval()
    try:
        rows = _token_logprobs(model, prompts, answers)
    finally:
        model.train(was_training)
    # One copy to the host for all rows.
    sums = torch.stack([logprobs.sum() for logprobs, _ in rows]).tolist()
    greedy = torch.stack([best.all() for _, best in rows]).tolist()
    return list(zip(sums, greedy, strict=True))


def _token_logprobs(
    model: Sphinx, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor]]:
    """For the n tokens of each row's answer: log-probabilities [n] float32, and whether each is the
    best one [n]."""
    device = model.decoder.tok_embeddings.weight.device
    # An answer's last token predicts nothing here.
    rows = [
        torch.tensor([*prompt.ids, *answer[:-1]], device=device)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    ids_BT = pad_sequence(rows, batch_first=True)
    x_BTD = place_images(model, model.decoder.embed(ids_BT.clamp(min=0)), ids_BT, prompts)
    positions_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
    hidden_BTD = model.decoder(x_BTD, positions_BT)
    predicting = [
        hidden_BTD[row, len(prompt.ids) - 1 : len(prompt.ids) - 1 + len(answer)]
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    logits_MV = model.decoder.logits(torch.cat(predicting)).float()
    targets_M = torch.tensor([token for answer in answers for token in answer], device=device)
    logprobs_M = logits_MV.log_softmax(-1).gather(1, targets_M[:, None]).squeeze(1)
    best_M = logits_MV.argmax(-1) == targets_M
    sizes = [len(answer) for answer in answers]
    return list(zip(torch.split(logprobs_M, sizes), torch.split(best_M, sizes), strict=True))


@torch.no_grad()
def choice_loglikelihoods(
    model: Sphinx, prompts: Sequence[Prompt], choices: Sequence[Sequence[list[int]]], normalise: bool = False
) -> list[list[float]]:
    """The log-probability in nats of every choice as the answer to its prompt: the sum over its
    tokens.

    A prompt, with its images, is read once for all of its choices. The model keeps its mode.

    Args:
        choices: token ids of the possible answers to each prompt.
        normalise: divide by the number of tokens, so that long answers are not at a disadvantage.

    Raises:
        UserError: a prompt without choices, an empty one, or see `check_prompts`.
    """
    if not prompts:
        return []
    for number, answers in enumerate(choices):
        if not answers or not all(answers):
            raise UserError(f"prompt {number}: every prompt needs choices, and every choice at least one token")
    longest = [max(map(len, answers)) for answers in choices]
    check_prompts(model, prompts, longest)
    was_training = model.training
    model.eval()
    try:
        prefix = Prefix(model, prompts, max(longest))
        device = prefix.device
        flat = [torch.tensor(answer, device=device) for answers in choices for answer in answers]
        rows_R = torch.tensor([row for row, answers in enumerate(choices) for _ in answers], device=device)
        ids_RT = pad_sequence(flat, batch_first=True)
        lengths_R = torch.tensor([len(answer) for answer in flat], device=device)
        first_BV = model.decoder.logits(prefix.last_BD).float().log_softmax(dim=-1)
        sums_R = first_BV[rows_R, ids_RT[:, 0]]
        if ids_RT.shape[1] > 1:
            prefix.select(rows_R)
            hidden_RTD = prefix.follow(ids_RT[:, :-1])
            is_answer_RT = torch.arange(1, ids_RT.shape[1], device=device) < lengths_R[:, None]
            logp_MV = model.decoder.logits(hidden_RTD[is_answer_RT]).float().log_softmax(dim=-1)
            logp_M = logp_MV.gather(1, ids_RT[:, 1:][is_answer_RT][:, None]).squeeze(1)
            sums_R = sums_R.index_add(0, is_answer_RT.nonzero()[:, 0], logp_M)
        scores = iter((sums_R / lengths_R if normalise else sums_R).tolist())
        return [[next(scores) for _ in answers] for answers in choices]
    finally:
        model.train(was_training)
