"""EfficientNet-Lite as PyTorch ports of TensorFlow's weights name it: `_blocks.0._bn1`.

They count blocks from first to last, and norms by what they follow; timm counts both in each stage.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx_pl.models.published import PublishedLayout, Source

_TOP = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
"""Of blocks that do not expand their channels."""
_EXPANDING = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
_EXPANDING |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}


def _source(name: str, encoder: Any) -> Source:
    own = name.removeprefix("model.")
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)", own)
    if match is None:
        module, _, leaf = own.partition(".")
        return Source((f"{_TOP.get(module, module)}.{leaf}",))
    stage, index, module, leaf = int(match[1]), int(match[2]), match[3], match[4]
    stages = encoder.model.blocks
    number = sum(len(blocks) for blocks in list(stages)[:stage]) + index
    names = _EXPANDING if hasattr(stages[stage][index], "conv_pwl") else _FIRST
    return Source((f"_blocks.{number}.{names.get(module, module)}.{leaf}",))


def efficientnet_layout(architecture: str) -> tuple[PublishedLayout, ...]:
    """The layout, for timm's models that are published so; nothing for others."""
    if not architecture.startswith("tf_efficientnet_lite"):
        return ()
    unused = (r"_fc\.(weight|bias)", r".+\.num_batches_tracked")
    return (PublishedLayout("EfficientNet-PyTorch", _source, unused),)
