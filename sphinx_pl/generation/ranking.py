"""How probable each of some given answers is: multiple choice without generation.

Shapes: B prompts, R answers of all of them, T tokens of the longest answer, V pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from sphinx_pl.generation.prompt import Prefix, Prompt, check_prompts
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


@torch.no_grad()
def rank(
    model: Sphinx, prompts: Sequence[Prompt], choices: Sequence[Sequence[list[int]]], normalise: bool = False
) -> list[list[float]]:
    """The log-probability in nats of every choice as the answer to its prompt: of all its tokens together.

    A prompt, with its images, is read once for all of its choices. The model's mode is left as it was.

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
            said = torch.arange(1, ids_RT.shape[1], device=device) < lengths_R[:, None]
            logp_MV = model.decoder.logits(hidden_RTD[said]).float().log_softmax(dim=-1)
            logp_M = logp_MV.gather(1, ids_RT[:, 1:][said][:, None]).squeeze(1)
            sums_R = sums_R.index_add(0, said.nonzero()[:, 0], logp_M)
        scores = iter((sums_R / lengths_R if normalise else sums_R).tolist())
        return [[next(scores) for _ in answers] for answers in choices]
    finally:
        model.train(was_training)
