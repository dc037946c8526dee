"""The keys of evaluate.py."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import DictConfig

from sphinx_pl.data.files import identity
from sphinx_pl.generation.decoding import Decoding
from sphinx_pl.runtime.device import check_precision
from sphinx_pl.settings.data import check_benchmark, check_data
from sphinx_pl.utils.config import build, refuse_unread
from sphinx_pl.utils.errors import UserError


@dataclass
class ReweightingOptions:
    """The strength with which a new mixture favours failures.

    See `sphinx_pl.evaluation.mixtures.reweighting`.
    """

    strength: float = 0.5
    prior: float = 20.0
    bound: float = 3.0
    at_most: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"reweighting.strength={self.strength} must be 0 to 1")
        if self.prior <= 0 or self.bound < 1 or self.at_most < 1:
            raise UserError(
                f"reweighting: prior={self.prior} must be above 0, bound={self.bound} and at_most={self.at_most} "
                "at least 1"
            )


@dataclass
class EvaluateConfig:
    """The keys of conf/evaluate.yaml with their types. That file explains them."""

    checkpoint: Optional[str] = None
    test: Optional[list[str]] = None
    benchmarks: Optional[list[str]] = None
    limit: Optional[int] = None
    seed: int = 0
    batch_size: int = 32
    generation: Decoding = field(default_factory=Decoding)
    ranking: bool = False
    shuffled: bool = True
    constant: int = 5000
    device: str = "auto"
    precision: str = "fp32"
    out: Optional[str] = None
    overwrite: bool = False
    report: Optional[str] = None
    then: Optional[str] = None
    mixture_out: Optional[str] = None
    reweighting: ReweightingOptions = field(default_factory=ReweightingOptions)
    wandb: Optional[dict[str, Any]] = None

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise UserError("which checkpoint? Give checkpoint=FOLDER, such as one that train.py wrote")
        check_precision(self.precision)
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        if self.then not in (None, "mixture"):
            raise UserError(f"then={self.then} must be null or mixture")
        if self.then and not self.asks_tasks:
            raise UserError("then=mixture needs test sources, not only benchmarks: name them, such as test=[tasks]")
        if self.mixture_out and not self.then:
            raise UserError("mixture_out is the file that then=mixture writes: set both keys")

    @property
    def asks_tasks(self) -> bool:
        """Whether the test sources are asked: they are named, or no benchmark is."""
        return self.test is not None or not self.benchmarks

    def settings(self) -> dict[str, Any]:
        """Return the settings that answers depend on besides the questions, for the answer log."""
        assert self.checkpoint is not None
        files = sorted(path for path in Path(self.checkpoint).glob("*") if path.is_file())
        return {
            "checkpoint": hashlib.sha256(" ".join(identity(str(path)) for path in files).encode()).hexdigest(),
            "generation": dataclasses.asdict(self.generation),
            "ranking": self.ranking,
            "precision": self.precision,
        }


def check_evaluate(cfg: DictConfig) -> None:
    """Check the configuration of evaluate.py.

    Raises:
        UserError: nothing reads a key, or a value of the data or the benchmarks is wrong.
    """
    refuse_unread(cfg, "", [*EvaluateConfig.__dataclass_fields__, "data", "benchmark"])
    build(Decoding, cfg.get("generation") or {}, "generation")
    build(ReweightingOptions, cfg.get("reweighting") or {}, "reweighting")
    check_data(cfg)
    check_benchmark(cfg)
