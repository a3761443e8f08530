"""Narrow rows whose numbers take few levels: symbols rather than points.

Found from rows alone, so that an attacker need not be told how a release was quantised. Rounding on
the wire does no harm: a number is read as its nearest level.

Shapes: ``N`` rows, ``r`` width of a row, ``L`` levels of one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_WIDEST = 64  # numbers a row: wider rows are representations
_MOST = 64  # levels a number
_ROWS_A_LEVEL = 8  # fewer, and few values may only mean few rows
_SAME = 1e-3  # of the range: nearer values are one level


@dataclass(frozen=True)
class Levels:
    """The levels that each number of a row takes.

    Attributes
    ----------
    values : sequence of float64 arrays (L,)
        Ascending, one array a number.
    """

    values: Sequence[NDArray[np.float64]]

    @classmethod
    def of(cls, rows_NR: NDArray[Any]) -> Self | None:
        """Find the levels; ``None`` where rows are wide or some number takes too many values."""
        if rows_NR.shape[1] > _WIDEST:
            return None
        found = []
        for column_N in np.asarray(rows_NR, dtype=np.float64).T:
            values = np.unique(column_N)
            apart = np.diff(values, prepend=-np.inf) > _SAME * (values[-1] - values[0])
            values = values[apart]
            if len(values) > min(_MOST, max(1, len(column_N) // _ROWS_A_LEVEL)):
                return None
            found.append(values)
        return cls(found)

    @property
    def sizes(self) -> list[int]:
        """Levels of each number."""
        return [len(values) for values in self.values]

    @property
    def symbols(self) -> int:
        """How many different rows there can be."""
        return prod(self.sizes)

    def places(self, rows_NR: NDArray[Any]) -> NDArray[np.int64]:
        """Give the index of each number's nearest level, (N, r)."""
        return np.stack(
            [
                np.searchsorted((values[1:] + values[:-1]) / 2, column_N)
                for values, column_N in zip(self.values, np.asarray(rows_NR).T, strict=True)
            ],
            axis=1,
        )

    def one_hot(self, rows_NR: NDArray[Any]) -> NDArray[np.float32]:
        """Mark each number's level, (N, sum of L)."""
        parts = [
            np.eye(size, dtype=np.float32)[place_N]
            for size, place_N in zip(self.sizes, self.places(rows_NR).T, strict=True)
        ]
        return np.concatenate(parts, axis=1)
