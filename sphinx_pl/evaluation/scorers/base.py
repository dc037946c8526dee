"""The `Score` of one answer, which a scorer returns."""

from __future__ import annotations

from dataclasses import dataclass

from sphinx_pl.data.coordinates import Coordinates

READER = Coordinates()
"""Reads boxes and points of any number of decimals, so it needs no model's geometry."""


@dataclass(frozen=True)
class Score:
    """The score of one answer.

    Attributes:
        value: 0 to 1.
        parsed: whether the answer has the form that the question asks for. An answer without it
            counts as wrong.
    """

    value: float
    parsed: bool = True
