"""SPHINX (Lin et al. 2023): visual tokens and text tokens through one decoder.

Shapes: B rows of T positions, N images of L tokens each, M supervised positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphinx_pl.data.schema import IGNORE, Batch
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.decoder import Decoder
from sphinx_pl.models.vision import MixedVisionEncoder
from sphinx_pl.utils.errors import UserError, suggest


@dataclass(slots=True)
class TokenLosses:
    """The losses of a batch's supervised positions.

    Add `extra` to the loss. It is the experts' weighted load-balancing loss, zero without experts; where the batch has
    no image, or no target, it also depends on the modules that would have been left out, so that every rank's backward
    pass runs the same modules, whatever its batch holds.
    """

    nll: Tensor  # [M] float32, nats
    index: Tensor  # [M] int64, flat b * T + t
    extra: Tensor  # [] float32


def packed_mask(segment_ids_BT: Tensor, question_ids_BT: Tensor) -> Tensor:
    """Who may attend to whom in packed rows, bool [B, 1, T, T].

    A position sees what is before it in its own segment, as far as it is shared prefix or its own question. Padding
    (segment 0) sees itself only: a row of nothing but -inf would be NaN.
    """
    length = segment_ids_BT.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    same = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & (segment_ids_BT != 0)[:, :, None]
    visible = (question_ids_BT[:, None, :] == 0) | (question_ids_BT[:, :, None] == question_ids_BT[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=causal.device)
    return (causal & same & visible | itself)[:, None]


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole shape of a parameter. Under ZeRO-3 its own shape is [0] between two uses."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


class Sphinx(nn.Module):
    """Mixed visual embeddings in front of the decoder; `vision` is None for a text-only model."""

    def __init__(self, config: SphinxConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        # The names of modules are names of tensors on disk, which stay `mixer.…`.
        self.mixer = MixedVisionEncoder(config.vision, config.decoder.width) if config.vision else None
        self.frozen: frozenset[str] = frozenset()

    @property
    def vision(self) -> MixedVisionEncoder | None:
        """The encoders and their projections; None for a text-only model."""
        return self.mixer

    def embed_images(self, pixels: Tensor, kept_NV: Tensor | None = None) -> Tensor:
        """uint8 [N, 3, S, S] -> [N, L, D]; [L, D] of all images if `kept_NV` says which views are kept.

        Raises:
            UserError: the model has no vision part.
        """
        if self.vision is None:
            raise UserError("this model has no vision part (model.vision=null) but was given an image")
        return torch.as_tensor(self.vision(pixels, kept_NV))

    def token_losses(self, batch: Batch) -> TokenLosses:
        """Negative log likelihood of each supervised target of packed rows."""
        x_BTD, extra = self._embed(batch)
        mask = packed_mask(batch.segment_ids, batch.question_ids)
        unevenness: list[Tensor] = []
        hidden_FD = self.decoder(x_BTD, batch.position_ids, mask, unevenness=unevenness).flatten(0, 1)
        if unevenness:
            extra = extra + self.config.decoder.balance_weight * torch.stack(unevenness).mean()
        labels = batch.labels.flatten()
        index = (labels != IGNORE).nonzero().squeeze(1)
        if len(index) == 0:
            extra = extra + 0.0 * self.decoder.logits(hidden_FD[:1]).float().sum()
            return TokenLosses(hidden_FD.new_zeros(0, dtype=torch.float32), index, extra)
        logits = self.decoder.logits(hidden_FD[index]).float()
        return TokenLosses(F.cross_entropy(logits, labels[index], reduction="none"), index, extra)

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, D] with the image tokens in their slots, and a zero that depends on them."""
        x_BTD = self.decoder.embed(batch.input_ids)
        zero = x_BTD.new_zeros((), dtype=torch.float32)
        if self.vision is None and len(batch.pixels) == 0:
            return x_BTD, zero
        if len(batch.pixels) == 0:  # the encoders still run, on one blank image
            assert self.config.vision is not None
            size, views = self.config.vision.image_size, self.config.vision.views
            blank = batch.pixels.new_zeros(1, 3, size, size)
            kept_NV = torch.arange(views, device=blank.device)[None] == 0 if self.config.vision.skip_padding else None
            return x_BTD, zero + 0.0 * self.embed_images(blank, kept_NV).float().sum()
        tokens = self.embed_images(batch.pixels, batch.kept_views).flatten(0, -2)
        flat = x_BTD.flatten(0, 1).index_copy(0, batch.image_slots, tokens.to(x_BTD.dtype))
        return flat.view_as(x_BTD), zero

    def parts(self) -> dict[str, list[nn.Module | nn.Parameter]]:
        """The pieces that can be frozen: decoder, projections, and each encoder under its key."""
        parts: dict[str, list[nn.Module | nn.Parameter]] = {"decoder": [self.decoder]}
        if (vision := self.vision) is not None:
            parts["projections"] = [*vision.projections, vision.start_img, vision.end_img]
            if vision.config.skip_padding:
                parts["projections"].append(vision.skip_token)
            parts |= {kind: [encoder] for kind, encoder in vision.encoders.items()}
        return parts

    def part_parameters(self) -> dict[str, list[nn.Parameter]]:
        """All parameters, by part."""
        return {
            part: [p for piece in pieces for p in ([piece] if isinstance(piece, nn.Parameter) else piece.parameters())]
            for part, pieces in self.parts().items()
        }

    def freeze(self, names: Iterable[str]) -> None:
        """No gradients for these parts, and eval mode for good, whatever `.train()` says later.

        Raises:
            UserError: a part that this model does not have.
        """
        parts = self.parts()
        for name in names:
            if name not in parts:
                raise UserError(f"this model has no part '{name}' to freeze: {suggest(name, parts)}")
            for piece in parts[name]:
                piece.requires_grad_(False)
        self.frozen |= frozenset(names)
        self.train(self.training)

    def train(self, mode: bool = True) -> Sphinx:
        super().train(mode)
        for name in self.frozen:
            for piece in self.parts()[name]:
                if isinstance(piece, nn.Module):
                    piece.eval()
        return self

    def trainable_table(self) -> list[tuple[str, int, int]]:
        """(part, trainable parameters, frozen parameters) of every part."""
        table = []
        for name, parameters in self.part_parameters().items():
            trainable = sum(whole_shape(p).numel() for p in parameters if p.requires_grad)
            table.append((name, trainable, sum(whole_shape(p).numel() for p in parameters) - trainable))
        return table
