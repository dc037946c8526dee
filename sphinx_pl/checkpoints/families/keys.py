"""The keys of a config.json: each is read, has no effect, or is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from sphinx_pl.utils.errors import UserError

HARMLESS = (
    *("_*", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "unsloth_*"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "use_cache", "max_position_embeddings"),
    *("initializer_*", "*drop*", "gradient_checkpointing", "use_reentrant", "pretraining_tp", "attn_implementation"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict", "torchscript", "tokenizer_class"),
    *("finetuning_task", "problem_type", "max_length"),
    *("task_specific_params", "forced_decoder_ids", "*suppress_tokens", "apply_spec_augment", "max_window_layers"),
)
"""Keys of any model's config.json that say how a model is trained, cut short, shown or stored.

None changes what a weight means; what max_window_layers does is stated by layer_types.
"""

_HARMLESS_IN_DECODERS = (
    *("model_type", "id2label", "label2id", "is_llama_config", "transformers.js_config", "model_max_length"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "quantization*", "compression_config"),
    *("neftune_noise_alpha", "use_bfloat16", "use_flash_attn", "sep_token_id", "decoder_start_token_id"),
    # Of generation, which older versions keep in config.json.
    *("do_sample", "early_stopping", "temperature", "top_k", "top_p", "typical_p", "*num_beam*", "*_length"),
    *("*_penalty", "*no_repeat_ngram_size", "num_return_sequences"),
)
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rope_scaling": ({},),
    "rope_parameters": ({},),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
}
"""Values with which a key changes nothing, beside null, false, 0 and empty ones."""


class Keys:
    """The values of one section of a config.json. A null stands for a key that is not there.

    Args:
        defaults: what the family's class takes for keys that are not there.
        section: the section's name with a dot behind it; "" for the file itself.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], section: str = "") -> None:
        self._values = {**defaults, **values}
        self._read: set[str] = set()
        self.section = section

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def __getitem__(self, key: str) -> Any:
        """Raises: KeyError: the key is not there."""
        if (value := self(key)) is None:
            raise KeyError(self.section + key)
        return value

    def without_effect(self, *keys: str) -> None:
        """Note keys that nothing reads where another key has the value that it has."""
        self._read |= {*keys}

    def refuse(self, key: str) -> UserError:
        """The error for a key whose value the decoder does not compute."""
        return UserError(f"{self.section}{key}={self._values.get(key)!r} is not what the decoder here computes")

    def check_rest(self, harmless: Iterable[str] = (*HARMLESS, *_HARMLESS_IN_DECODERS)) -> None:
        """Raises: UserError: a key that nobody has read may change what the model computes."""
        for key, value in self._values.items():
            known = key in self._read or any(fnmatchcase(str(key), pattern) for pattern in harmless)
            if known or not value or value in _NEUTRAL.get(key, ()):
                continue
            if key == "layer_types" and set(value) == {"full_attention"}:
                continue
            raise self.refuse(str(key))
