"""How likely a model holds given answers to be: batched, one forward pass, no cache.

Rows are padded on the right, where nothing attends to the padding, so that plain causal attention needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sphinx_pl.generation.prompt import Prompt, check_prompts, place_images
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.errors import UserError


@torch.no_grad()
def answer_logprobs(
    model: Sphinx, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """Of each pair of a prompt and an answer's token ids, as one batch: the sum of the tokens' log-probabilities
    (nats, float32), and whether every token is the most likely one. The model's mode is left as it was.

    Raises:
        UserError: an empty answer, slots that do not match the images, or a prompt with an answer too long for the
            decoder.
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
        found = _token_logprobs(model, prompts, answers)
    finally:
        model.train(was_training)
    # One copy to the host for all rows.
    sums = torch.stack([logprobs.sum() for logprobs, _ in found]).tolist()
    greedy = torch.stack([best.all() for _, best in found]).tolist()
    return list(zip(sums, greedy, strict=True))


def _token_logprobs(
    model: Sphinx, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Of each row, for the n tokens of its answer: log-probabilities [n] float32, and whether it is the best [n]."""
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
