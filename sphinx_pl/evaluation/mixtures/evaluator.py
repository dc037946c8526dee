"""The evaluation of unwritten mixtures: each overwrites one model's weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from sphinx_pl.checkpoints.format import Checkpoint
from sphinx_pl.checkpoints.tensors import copy_into
from sphinx_pl.evaluation.objective import Measurements
from sphinx_pl.mixing.mixer import Facts
from sphinx_pl.mixing.plan import MixPlan
from sphinx_pl.models.placement import allocate
from sphinx_pl.models.sphinx import Sphinx
from sphinx_pl.utils.console import Steps

PartWeights = Mapping[str, Sequence[float]]
"""The weights of each tensor by its name."""


class MixtureEvaluator:
    """Measures mixtures of a plan's checkpoints with other weights than the plan's.

    The model's weights are exactly those that would be written. Tensors that are equal in all
    checkpoints are read once.

    Args:
        plan: its checkpoints have our names.
        measure: a model -> its losses and scores.
        dtype: floating-point tensors are rounded to it; None: to their own.
        steps: is told when a mixture begins.

    Raises:
        UserError: the checkpoints' tensors are not those of their model.
    """

    def __init__(
        self,
        plan: MixPlan,
        measure: Callable[[Sphinx], Measurements],
        device: torch.device,
        dtype: torch.dtype | None = None,
        steps: Steps | None = None,
    ) -> None:
        first = plan.models[0]
        assert isinstance(first, Checkpoint)
        with torch.device("meta"):
            model = Sphinx(first.model_config)
        first.check(model)
        self.plan = plan
        allocate(model, device)
        self.model = model.eval()
        self.dtype = dtype
        self.steps = steps
        self.evaluations = 0
        self._measure = measure
        self._keys = list(first)
        self._read = False

    @property
    def changing(self) -> Sequence[str]:
        """The names of the tensors in which checkpoints differ; all before the first evaluation."""
        return self._keys

    def __call__(self, weights: Sequence[float] | PartWeights) -> Measurements:
        """The losses and scores of the mixture with these weights, for all tensors or by name."""
        if self.steps is not None:
            common = "" if isinstance(weights, Mapping) else f" with weights {', '.join(f'{w:.3g}' for w in weights)}"
            self.steps.begin(f"mixing{common}, then measuring")
        mixer = self.plan.mixer(watch=not self._read)
        mixer.weights = weights if isinstance(weights, Mapping) else dict.fromkeys(self._keys, weights)
        copy_into(self.model.state_dict(), ((key, mixer.tensor(key, self.dtype)) for key in self._keys))
        if not self._read:
            self._keys = [key for key in self._keys if not Facts.from_json(mixer.facts(key)).equal]
            self._read = True
        self.evaluations += 1
        return self._measure(self.model)
