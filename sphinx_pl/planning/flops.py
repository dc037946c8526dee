"""FLOPs of training, for what is measured (callbacks/throughput.py) and what is planned (plan.py)."""

from __future__ import annotations

from sphinx_pl.data.schema import Batch
from sphinx_pl.models.sphinx import Sphinx


class TrainingFlops:
    """FLOPs of forward and backward, from what the host knows about a batch (nothing waits for the device).

    A part that trains costs three times its forward pass: the gradients of inputs and of weights cost one each. A
    frozen tower runs without gradients and costs one; a frozen decoder still passes gradients on and costs two.
    Views that are skipped as padding cost nothing. The decoder's attention costs what its mask lets through: pairs
    within a sample, a shared prefix once. Its matrices also cost what they do for padding.
    """

    def __init__(self, model: Sphinx) -> None:
        frozen = {name for name, trainable, _ in model.trainable_table() if not trainable}
        self.decoder = model.decoder
        self.decoder_factor = 2.0 if "decoder" in frozen else 3.0
        self.mixer = model.mixer
        self.frozen_per_view = sum(
            tower.flops()  # type: ignore[operator]
            for name, tower in (model.mixer.towers.items() if model.mixer is not None else ())
            if name in frozen
        )

    @property
    def per_image(self) -> float:
        """Of one image none of whose views is skipped."""
        return self.vision(1)

    def vision(self, images: float, views: float | None = None) -> float:
        """Of so many images, with `views` that are not skipped in all of them (None: none is skipped)."""
        if self.mixer is None:
            return 0.0
        views = images * self.mixer.config.views if views is None else views
        return 3 * self.mixer.flops(images, views) - 2 * views * self.frozen_per_view

    def __call__(self, batch: Batch) -> float:
        rows, length = batch.input_ids.shape
        views = int(batch.counters["views"]) if batch.kept_views is not None else None
        counters = batch.counters
        return self.of(rows * length, counters["pairs"], counters["targets"], len(batch.pixels), views)

    def of(self, positions: int, pairs: float, supervised: float, images: float, views: float | None = None) -> float:
        """FLOPs of a micro-batch.

        The towers run on a blank image where it has none, on one view if they skip any.

        Args:
            pairs: how many pairs of positions may attend (`Sample.pairs`).
        """
        decoder = self.decoder.flops(positions, pairs, max(1, int(supervised)))
        if images == 0 and self.mixer is not None and self.mixer.config.skip_padding:
            views = 1
        return self.decoder_factor * decoder + self.vision(max(1, images), views)
