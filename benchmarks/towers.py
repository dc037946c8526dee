"""How much each tower's tokens depend on the image: what a decoder could read from them at all.

    python -m benchmarks.towers outputs/demo/pretrain_real/model outputs/demo/finetune/model

0: every image gives the same tokens, as a collapsed tower does; 1: tokens share nothing from image to image. The first
row is a model of the first checkpoint's configuration with new weights, to compare with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sphinx_pl.checkpoints.format import open_checkpoint
from sphinx_pl.data.images import load_image
from sphinx_pl.data.readers import expand_paths, spread
from sphinx_pl.data.schema import ImageRef
from sphinx_pl.data.skip import BadSample
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.runtime.hydra_app import report
from sphinx_pl.utils.errors import UserError

IMAGES = "data/sample/instructions/images/test-*.jpg"


def dependence(tokens: Tensor) -> float:
    """[images, tokens, width] -> the share in 0-1 of the tokens' root mean square that changes with the image."""
    values = tokens.double()
    return float((values.var(dim=0, correction=0).mean() / values.square().mean()).sqrt())


@torch.inference_mode()
def measure(model: Sphinx, pixels: Tensor) -> dict[str, float]:
    """Encoder, and "embeddings" for the decoder's input -> `dependence`; `pixels` are uint8 [N, 3, S, S]."""
    assert model.vision is not None
    model.eval()
    shares = {kind: dependence(model.vision.encode(encoder, pixels)) for kind, encoder in model.vision.encoders.items()}
    return shares | {"embeddings": dependence(model.embed_images(pixels))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="weights-only checkpoint folders of one configuration")
    parser.add_argument("--images", default=IMAGES, help=f"a glob of image files (default: {IMAGES})")
    parser.add_argument("--limit", type=int, default=64, help="at most so many images, evenly over all (default: 64)")
    options = parser.parse_args(arguments)
    try:
        opened = [open_checkpoint(path) for path in options.checkpoints]
        files = expand_paths("--images", options.images)
        torch.manual_seed(0)
        model = Sphinx(opened[0].model_config)
        if model.mixer is None:
            raise UserError(f"{opened[0].path}: its model has no vision part: there are no towers to measure")
        chosen = [ImageRef(files[index]) for index in spread(len(files), options.limit)]
        pixels = torch.stack([load_image(image, model.mixer.config.image_size) for image in chosen])
        table = Table(title=f"Dependence of tokens on the image, {len(chosen)} images")
        rows = {"new weights": measure(model, pixels)}
        for checkpoint in opened:
            checkpoint.load_into(model)
            rows["/".join(checkpoint.path.absolute().parts[-3:])] = measure(model, pixels)
    except (UserError, BadSample) as error:
        return report(error)
    table.add_column("weights")
    for name in rows["new weights"]:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
