"""FLOPs of training, for what is measured (callbacks/throughput.py) and what is planned (plan.py)."""

from __future__ import annotations

from sphinx_pl.data.record import Batch
from sphinx_pl.models.sphinx import Sphinx


class TrainingFlops:
    """FLOPs of forward and backward, from what the host knows about a batch (nothing waits for the device).

    A part that trains costs three times its forward pass: the gradients of inputs and of weights cost one each. A
    frozen tower runs without gradients and costs one; a frozen decoder still passes gradients on and costs two.
    """

    def __init__(self, model: Sphinx) -> None:
        frozen = {name for name, trainable, _ in model.trainable_table() if not trainable}
        self.decoder = model.decoder
        self.decoder_factor = 2.0 if "decoder" in frozen else 3.0
        self.per_image = 3 * model.flops_per_image()
        if model.mixer is not None and model.config.vision is not None:
            views = model.config.vision.views
            for name, tower in model.mixer.towers.items():
                if name in frozen:
                    self.per_image -= 2 * views * tower.flops()  # type: ignore[operator]

    def __call__(self, batch: Batch) -> float:
        rows, length = batch.input_ids.shape
        return self.of(rows, length, batch.counters.get("targets", 0), len(batch.pixels))

    def of(self, rows: int, length: int, supervised: float, images: float) -> float:
        """Of a micro-batch; the towers run on a blank image where it has none."""
        decoder = self.decoder.flops(rows * length, length, max(1, int(supervised)))
        return self.decoder_factor * decoder + max(1, images) * self.per_image
