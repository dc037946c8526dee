"""Checks before a run: whether weights belong to this model, and whether a stage can resume from a
checkpoint."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from sphinx_pl.checkpoints.format import Checkpoint, differences
from sphinx_pl.checkpoints.tensors import compare
from sphinx_pl.checkpoints.training import TrainingCheckpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.tokenizers import Tokenizer
from sphinx_pl.models.config import SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.stages.optim import OptimConfig, optimizer_groups
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import hash_file

log = logging.getLogger(__name__)


def check_same_model(
    checkpoint: Checkpoint, config: SphinxConfig, processor: Processor | None, key: str, free: tuple[str, ...]
) -> None:
    """Check that the weights that `key` names belong to this model and tokenizer.

    Args:
        processor: the processor of this run; None skips its comparison.
        free: beginnings of the model's keys that may differ.

    Raises:
        UserError: they belong to another model or tokenizer.
    """
    differing = differences(checkpoint.model_config.to_dict(), config.to_dict(), "model")
    for difference in differing:
        if difference.startswith(free):
            log.warning("%s in %s and in this run", difference, key)
        else:
            raise UserError(f"{key} holds another model, {difference}: choose the model that it was made with")
    if processor is None:
        return
    file, tokenizer = checkpoint.tokenizer_file, processor.tokenizer
    # The weights were trained with its new tokens, or get them now.
    extended = bool(tokenizer.new_tokens) and file.read_bytes() == tokenizer.files.get(file.name)
    if not extended and hash_file(file) != hash_file(tokenizer.path):
        raise UserError(
            f"{key} was trained with another tokenizer than {processor.tokenizer.path}: "
            f"set data.tokenizer={checkpoint.tokenizer_file}"
        )
    for difference in differences(checkpoint.processor, processor.to_dict(), "data.processor"):
        log.warning("%s in %s and in this run", difference, key)


def with_new_tokens(config: SphinxConfig, tokenizer: Tokenizer) -> tuple[SphinxConfig, str]:
    """The model with room for the control tokens that its tokenizer got, and a sentence that says
    so; "" if it got none."""
    decoder = config.decoder
    if not tokenizer.new_tokens:
        return config, ""
    sentence = f"the tokenizer gets {len(tokenizer.new_tokens)} new control tokens, {', '.join(tokenizer.new_tokens)}"
    if tokenizer.vocab_size <= decoder.vocab_size:
        return config, f"{sentence}: they take rows of the vocabulary that no token had"
    rows = dataclasses.replace(decoder, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(config, decoder=rows), (
        f"{sentence}: the vocabulary grows from {decoder.vocab_size} to {tokenizer.vocab_size}, and each new row of "
        "loaded embeddings and of the output head is the mean of the old ones"
    )


def check_resume(
    resume: Path,
    config: SphinxConfig,
    optim: OptimConfig,
    train_parts: Sequence[str],
    parts: Sequence[str],
    processor: Processor | None,
    free: tuple[str, ...],
) -> None:
    """Check that a stage can resume from this checkpoint.

    Args:
        parts: names of all parts of the model.
        processor: see `check_same_model`.
        free: see `check_same_model`.

    Raises:
        UserError: the checkpoint is damaged, or its weights or optimizer states do not match
            the stage.
    """
    key = f"ckpt_path={resume}"
    try:
        checkpoint = TrainingCheckpoint(resume)
        state = checkpoint.shards.state()
        kinds = checkpoint.shards.kinds()
    except UserError as error:
        raise UserError(f"{key} is not a checkpoint to resume from: {error}") from None
    check_same_model(checkpoint, config, processor, key, free)
    with torch.device("meta"):
        model = Sphinx(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if problem := compare(shapes, checkpoint.shards.shapes):
        raise UserError(f"{key} belongs to another model: {problem}")
    instead = f"or start a new run from its weights (stage.init_from={resume})"
    kind = state.get("optim", {}).get("kind", "adamw" if kinds else optim.kind)
    if kind != optim.kind:
        raise UserError(
            f"stage.optim.kind={optim.kind}: the states in {key} are those of {kind}: set "
            f"stage.optim.kind={kind}, {instead}"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    part_of = {names[id(p)]: part for part, parameters in model.part_parameters().items() for p in parameters}
    model.freeze(part for part in parts if part not in train_parts)
    groups = optimizer_groups(model.part_parameters(), optim)
    configured = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    stored: list[list[str]] = state["optimizer_names"]
    before, now = ({name for group in of for name in group} for of in (stored, configured))
    if before != now:
        trained = [part for part in parts if part in {part_of[name] for name in before}]
        raise UserError(
            f"stage.train_parts=[{','.join(train_parts)}]: in {key} other parts train: set "
            f"stage.train_parts=[{','.join(trained)}], {instead}"
        )
    if stored != configured:
        raise UserError(
            f"stage.optim.lr_scale={optim.lr_scale}: in {key} other parts have learning rates of their own: "
            f"set the factors of that run, {instead}"
        )
