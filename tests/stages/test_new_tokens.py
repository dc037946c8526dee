"""A prompt format whose control tokens the tokenizer lacks: the vocabulary grows, and all of it is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.grown import VOCABULARY, grown
from sphinx_pl.checkpoints.native import write_checkpoint
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.models.config import DecoderConfig, SphinxConfig
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.stages.checks import with_new_tokens
from sphinx_pl.stages.stage import Stage
from sphinx_pl.utils.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizer.model"
CHATML = {"prompt_format": "chatml"}


def text_model(vocab_size: int, load: str | None = None, tied: bool = False) -> SphinxConfig:
    decoder = DecoderConfig(vocab_size, 16, 1, 2, 2, 24, max_positions=64, tie_embeddings=tied, load=load)
    return SphinxConfig("text", decoder, None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = text_model(512)
    return write_checkpoint(
        tmp_path / "base", Sphinx(config).state_dict(), config.to_dict(), {}, GOLDEN, {"stage": None}
    )


def stage(config: SphinxConfig, init_from: Path | None = None) -> Stage:
    optim = {"kind": "sgd", "lr": 0.1}
    return Stage(config, "s", ["decoder"], optim, max_steps=1, init_from=init_from and str(init_from))


@pytest.mark.parametrize("way", ["init_from", "load"])
def test_new_tokens_grow_the_model_and_stay(base: Path, tmp_path: Path, way: str) -> None:
    config = text_model(512, load=str(base) if way == "load" else None)
    processor = Processor.from_dict(CHATML, base, config, grows=True)
    config, sentence = with_new_tokens(config, processor.tokenizer)
    assert sentence.startswith(
        "the tokenizer gets 2 new control tokens, <|im_start|>, <|im_end|>: the vocabulary grows"
    )
    assert config.decoder.vocab_size == 514
    first = stage(config, base if way == "init_from" else None)
    first.check(processor)
    first.configure_model()
    before, after = open_checkpoint(base), first.sphinx.state_dict()
    for name in before:
        old, new = before.tensor(name), after[name]
        assert torch.equal(new[: len(old)], old), name
        if name in VOCABULARY:
            mean = old.double().mean(0).float()
            assert new.shape == (514, 16)
            assert torch.equal(new[512], mean)
            assert torch.equal(new[513], mean)
    # The folder is whole: its tokenizer and its model agree, and the next stage starts from it.
    saved = write_checkpoint(
        tmp_path / "saved", after, config.to_dict(), processor.to_dict(), processor.tokenizer, {"stage": "s"}
    )
    checkpoint = open_checkpoint(saved)
    again = Processor.from_dict(checkpoint.processor, checkpoint.tokenizer_file, checkpoint.model_config)
    assert (again.tokenizer.vocab_size, again.tokenizer.new_tokens) == (514, ())
    assert again.stop_sequences == processor.stop_sequences == [[513]]
    for tokenizer in (again, processor):  # the saved tokenizer, or the base's that grows again
        second = stage(config, saved)
        second.check(tokenizer)
        second.configure_model()
        assert all(torch.equal(second.sphinx.state_dict()[name], after[name]) for name in after)


def test_rows_that_no_token_had_are_used(base: Path) -> None:
    padded = text_model(520)
    processor = Processor.from_dict(CHATML, base, padded)
    assert with_new_tokens(padded, processor.tokenizer) == (
        padded,
        "the tokenizer gets 2 new control tokens, <|im_start|>, <|im_end|>: they take rows of the vocabulary that no "
        "token had",
    )
    assert with_new_tokens(padded, load_tokenizer(GOLDEN)) == (padded, "")


def test_a_larger_vocabulary_without_new_tokens_is_another_model(base: Path) -> None:
    config = text_model(520)
    with pytest.raises(UserError, match=r"model.decoder.vocab_size is 512 and 520"):
        stage(config, base).check(Processor.from_dict({}, base, config))
    with pytest.raises(UserError, match=r"514 pieces with the new <\|im_start\|>, <\|im_end\|> but .* is 512"):
        Processor.from_dict(CHATML, base, text_model(512))


def test_a_grown_checkpoint_is_read_like_any_other(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    assert grown(checkpoint, 512) is checkpoint
    larger = grown(checkpoint, 600)
    assert larger.model_config == dataclasses.replace(
        checkpoint.model_config, decoder=dataclasses.replace(checkpoint.model_config.decoder, vocab_size=600)
    )
    with torch.device("meta"):
        larger.check(Sphinx(text_model(600)))
    assert {name: larger.info(name).shape for name in larger} == {
        name: tuple(larger.tensor(name).shape) for name in larger
    }
