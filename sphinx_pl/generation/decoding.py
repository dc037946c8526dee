"""The options of decoding, and the end of an answer. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from sphinx_pl.utils.errors import UserError


@dataclass
class OperaConfig:
    """OPERA's numbers (Huang et al., CVPR 2024, arXiv 2311.17911), with the names and defaults of
    its official code.

    `penalty_weights` is the paper's alpha, `scale_factor` sigma, `num_attn_candidates` N_can (of
    each beam), `window_size` k and l, `threshold` r, and `max_rollbacks` beta (0: no
    retrospection).

    The official code differs from the paper in two ways, which have keys here. It multiplies the
    penalty by 1e-7 (`damping`; the paper's value is 1). In the first 10 tokens (`early_tokens`; the
    paper's value is 0) it rewards attention to the image instead. It also never goes back to one of
    these tokens.
    """

    num_attn_candidates: int = 5
    penalty_weights: float = 1.0
    scale_factor: float = 50.0
    window_size: int = 512
    threshold: int = 15
    max_rollbacks: int = 5
    damping: float = 1e-7
    early_tokens: int = 10

    def __post_init__(self) -> None:
        least = {"num_attn_candidates": 2, "window_size": 1, "threshold": 1, "max_rollbacks": 0, "early_tokens": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"generation.opera.{name}={getattr(self, name)} must be at least {smallest}")
        # NaN fails both
        if not (self.penalty_weights >= 0 and self.scale_factor > 0 and self.damping > 0):
            raise UserError(
                f"generation.opera: penalty_weights={self.penalty_weights} must not be negative, "
                f"scale_factor={self.scale_factor} and damping={self.damping} must be positive"
            )


@dataclass(slots=True)
class GenerationConfig:
    """The choice of tokens, and the end of an answer.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens with at least that
    probability. `stop` holds token sequences that end an answer without being part of it, as
    `eos_id` does.

    With `num_beams` above 1 a beam search finds the answer. It has the highest sum of
    log-probabilities, divided by the length in tokens (including the end) to the power of
    `length_penalty`. So values above 0 favour long answers. `opera` adds OPERA's penalty and
    retrospection to that search.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos_id: Optional[int] = None
    stop: list[list[int]] = field(default_factory=list)
    num_beams: int = 1
    length_penalty: float = 1.0
    opera: Optional[OperaConfig] = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"generation.max_new_tokens must be positive, not {self.max_new_tokens}")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:  # NaN fails both
            raise UserError(
                f"generation.temperature={self.temperature} must be >= 0 and generation.top_p={self.top_p} in (0, 1]"
            )
        if any(not sequence for sequence in self.stop):
            raise UserError("generation.stop holds an empty sequence, which would end every answer at once: remove it")
        if self.num_beams < 1:
            raise UserError(f"generation.num_beams={self.num_beams} must be at least 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(
                f"generation.num_beams={self.num_beams} searches, but generation.temperature={self.temperature} "
                "samples: set num_beams=1 or temperature=0"
            )
        if self.opera is not None and self.num_beams < 2:
            raise UserError("generation.opera is a kind of beam search: set generation.num_beams, to 5 as in the paper")


@dataclass
class Decoding:
    """The options of `GenerationConfig` that the entry scripts have in `generation`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    opera: Optional[OperaConfig] = None

    def __post_init__(self) -> None:
        GenerationConfig(**vars(self))  # it refuses contradictions


def append(answer: list[int], token: int, limit: int, config: GenerationConfig) -> bool:
    """Add `token` and return True if it ends the answer.

    The sequence that ended the answer is removed.
    """
    if token == config.eos_id:
        return True
    answer.append(token)
    for sequence in config.stop:
        if answer[-len(sequence) :] == sequence:
            del answer[-len(sequence) :]
            return True
    return len(answer) >= limit
