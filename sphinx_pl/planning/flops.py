"""FLOPs of training steps, measured (callbacks/throughput.py) or planned (plan.py)."""

from __future__ import annotations

from sphinx_pl.data.schema import Batch
from sphinx_pl.models.sphinx import Sphinx


class TrainingFlops:
    """FLOPs of forward and backward passes. Calling it with a batch does not wait for the device.

    A part that trains costs three times its forward pass: the gradients of inputs and of weights
    cost one each. A frozen encoder costs one; a frozen decoder passes gradients on and costs two.
    docs/performance.md says what counts.
    """

    def __init__(self, model: Sphinx) -> None:
        frozen = {name for name, trainable, _ in model.trainable_table() if not trainable}
        self.decoder = model.decoder
        self.decoder_factor = 2.0 if "decoder" in frozen else 3.0
        self.encoders = model.vision
        encoders = model.vision.encoders if model.vision is not None else {}
        self.frozen_per_view = sum(encoder.flops() for kind, encoder in encoders.items() if kind in frozen)

    @property
    def per_image(self) -> float:
        """FLOPs of one image with all its views."""
        return self.vision(1)

    def vision(self, images: float, views: float | None = None) -> float:
        """FLOPs of `images` images with `views` kept views together (None: all)."""
        if self.encoders is None:
            return 0.0
        views = images * self.encoders.config.views if views is None else views
        return 3 * self.encoders.flops(images, views) - 2 * views * self.frozen_per_view

    def __call__(self, batch: Batch) -> float:
        rows, length = batch.input_ids.shape
        views = int(batch.counters["views"]) if batch.kept_views is not None else None
        counters = batch.counters
        return self.of(rows * length, counters["pairs"], counters["targets"], len(batch.pixels), views)

    def of(self, positions: int, pairs: float, supervised: float, images: float, views: float | None = None) -> float:
        """FLOPs of a micro-batch.

        The encoders run on a blank image where it has none, on one view if they skip any.

        Args:
            pairs: how many pairs of positions may attend (`Sample.pairs`).
        """
        decoder = self.decoder.flops(positions, pairs, max(1, int(supervised)))
        if images == 0 and self.encoders is not None and self.encoders.config.skip_padding:
            views = 1
        return self.decoder_factor * decoder + self.vision(max(1, images), views)
