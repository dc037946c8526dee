"""SmolLM 3: LLaMA with layers that do not rotate queries and keys."""

from typing import Any

from sphinx_pl.checkpoints.families.base import FAMILIES, Family, layers_with_window, window_keys, window_options
from sphinx_pl.checkpoints.families.keys import Keys
from sphinx_pl.models.config import DecoderConfig


class SmolLM3(Family):
    """`SmolLM3ForCausalLM`. Its key `no_rope_layers` has a 1 for each layer that does rotate."""

    name = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    defaults = {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    }

    def options(self, keys: Keys) -> dict[str, Any]:
        layers, interval = keys["num_hidden_layers"], keys("no_rope_layer_interval", 4)
        rotated = keys("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
        if len(rotated) != layers:
            raise keys.refuse("no_rope_layers")
        unrotated = [layer for layer, does in enumerate(rotated) if not does]
        windows = layers_with_window(keys)
        if windows and keys("layer_types") is None:
            windows = window_options(keys["sliding_window"], unrotated, layers)
        return {"unrotated_layers": unrotated} | windows

    def keys(self, config: DecoderConfig) -> dict[str, Any]:
        rotated = [int(layer not in config.unrotated_layers) for layer in range(config.layers)]
        return {"no_rope_layers": rotated, "attention_bias": False, "mlp_bias": False} | window_keys(config)


FAMILIES.register(SmolLM3.name, SmolLM3())
