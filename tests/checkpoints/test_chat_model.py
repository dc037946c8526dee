"""A chat model of Hugging Face: its tokenizer and its prompt format go where its weights go."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from sphinx_pl.checkpoints.folder import read_json
from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.checkpoints.huggingface import write_huggingface
from sphinx_pl.cli.checkpoint import import_checkpoint
from sphinx_pl.data.processor import Processor
from tests.data.chat_templates import shipped


def test_a_chat_model_keeps_its_tokenizer_and_its_chat_template(tmp_path: Path) -> None:
    """Imported, exported and asked: all three with the tokenizer.json that it came with."""
    model = shipped()["smollm2"]
    sizes = {"vocab_size": 448, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=24)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model.write(tmp_path / "theirs")
    import_checkpoint(open_checkpoint(tmp_path / "theirs"), str(tmp_path / "ours"), overwrite=False)
    ours = open_checkpoint(tmp_path / "ours")
    assert ours.processor == {"prompt_format": "model"}
    assert {file.name for file in (tmp_path / "ours").glob("tokenizer*")} == {"tokenizer.json", "tokenizer_config.json"}
    processor = Processor.from_dict(ours.processor, ours.tokenizer_file, ours.model_config)
    assert processor.tokenizer.vocab_size < ours.model_config.decoder.vocab_size  # padded
    assert processor.format.end == "<|im_end|>"
    assert ours.compare(open_checkpoint(tmp_path / "theirs")) == ""
    write_huggingface(ours, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "ours" / "tokenizer.json").read_bytes()
    assert read_json(tmp_path / "back" / "config.json")["eos_token_id"] == processor.tokenizer.eos_id
