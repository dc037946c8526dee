"""Masks of boxes from Segment Anything (SAM), in the format of the Hugging Face library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sphinx_pl.checkpoints.hub import hub_snapshot
from sphinx_pl.data.coordinates import Box4
from sphinx_pl.models.published import HUB
from sphinx_pl.utils.errors import UserError
from sphinx_pl.utils.files import user_path

MARGIN = 0.1
"""How far a mask may extend beyond its box, as a share of the box's sides.

Boxes are rarely exact.
"""

_BATCH = 16
_FILES = ["*.json", "*.safetensors"]
_MODEL = "SAM model with config.json, preprocessor_config.json and model.safetensors, such as facebook/sam-vit-base"


class Segmenter:
    """A SAM model and its image processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor

    @classmethod
    def load(cls, name: str, device: torch.device | str = "cpu") -> Segmenter:
        """Load a model from a local folder, or by its name on the Hugging Face hub.

        Only safetensors files are read, since a pickle can run any code.

        Raises:
            UserError: there is no such model, or it cannot be read.
        """
        from transformers import SamModel, SamProcessor

        folder = _folder(name)
        try:
            processor = SamProcessor.from_pretrained(folder, local_files_only=True)
            model, info = SamModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # the library raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"sam={name}: {folder} is not a {_MODEL} ({reason})") from None
        if info["missing_keys"] or info["mismatched_keys"]:
            raise UserError(f"sam={name} lacks weights: {folder} is not a {_MODEL}")
        return cls(model.to(device), processor)

    @torch.no_grad()
    def segment(self, picture: Image.Image, boxes_px: Sequence[Box4]) -> NDArray[np.bool_]:
        """Return a mask for each box, [N, height, width] of the picture, within the box and a
        margin around it.

        A box outside of the picture has an empty mask.
        """
        width, height = picture.size
        masks = np.zeros((len(boxes_px), height, width), dtype=bool)
        clipped = [_clip(box, width, height) for box in boxes_px]
        real = [index for index, (x1, y1, x2, y2) in enumerate(clipped) if x1 < x2 and y1 < y2]
        for start in range(0, len(real), _BATCH):
            batch = real[start : start + _BATCH]
            masks_of_batch = self._predict(picture, [clipped[index] for index in batch])
            for index, mask in zip(batch, masks_of_batch, strict=True):
                x1, y1, x2, y2 = clipped[index]
                dx, dy = MARGIN * (x2 - x1), MARGIN * (y2 - y1)
                left, top, right, bottom = _clip((x1 - dx, y1 - dy, x2 + dx, y2 + dy), width, height)
                inside = np.s_[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))]
                masks[index][inside] = mask[inside]
        return masks

    def _predict(self, picture: Image.Image, boxes_px: list[Box4]) -> NDArray[np.bool_]:
        inputs = self.processor(images=picture, input_boxes=[[list(box) for box in boxes_px]], return_tensors="pt")
        device, dtype = self.model.device, self.model.dtype
        output = self.model(
            pixel_values=inputs["pixel_values"].to(device, dtype),
            input_boxes=inputs["input_boxes"].to(device, dtype),
            multimask_output=False,
        )
        (masks,) = self.processor.image_processor.post_process_masks(
            output.pred_masks.float().cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        result: NDArray[np.bool_] = masks[:, 0].numpy().astype(bool)
        return result


def _clip(box: Box4, width: int, height: int) -> Box4:
    x1, y1, x2, y2 = box
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _folder(name: str) -> Path:
    """The folder `name`, or the hub's model in the local cache, downloaded if it is missing."""
    folder = user_path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub.constants import HF_HUB_CACHE

    model = name.removeprefix(HUB)
    try:
        return hub_snapshot(model, _FILES)
    except Exception as error:  # two HTTP libraries and the hub raise their own
        raise UserError(
            f"sam={name}: there is no folder {folder}, and the model {model} is neither in {HF_HUB_CACHE} nor could it "
            f"be downloaded ({type(error).__name__}): get its files where there is internet and give their folder"
        ) from None
