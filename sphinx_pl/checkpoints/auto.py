"""The decoder's section of `model=auto`: that of the weights that it starts from."""

from __future__ import annotations

from dataclasses import asdict

from omegaconf import DictConfig

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.utils.errors import UserError

KEPT = ("max_positions", "balance_weight")
"""Keys of which a value beside `auto` comes before that of the weights."""


def fill_decoder(model: DictConfig) -> None:
    """Replace the section `decoder` of a model by that of the checkpoint in `decoder.load`, if
    `decoder.auto` asks for it.

    Raises:
        UserError: no weights are named, or `open_checkpoint` refuses them.
    """
    decoder = model.get("decoder")
    if not isinstance(decoder, DictConfig) or "auto" not in decoder:
        return
    if not decoder.auto:
        del decoder["auto"]
        return
    if not (load := decoder.get("load")):
        raise UserError(
            "model.decoder.auto=true takes the decoder's sizes from its weights: name them with "
            "model.decoder.load=FOLDER, a GGUF file or hf-hub:OWNER/NAME"
        )
    try:
        values = asdict(open_checkpoint(str(load)).model_config.decoder)
    except UserError as error:
        raise UserError(f"model.decoder.load={load}: {error}") from None
    own = {key: decoder[key] for key in KEPT if decoder.get(key) is not None}
    model["decoder"] = values | {"load": load} | own
