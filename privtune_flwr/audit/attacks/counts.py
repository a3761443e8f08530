"""A table of counts: which tokens stood behind each symbol in the attacker's own releases.

For narrow rows of few levels this is Bayes' rule without any model of the mechanism, whatever was
learned, and however a token's symbol varies with its context. Symbols that are rare back off to
those that share all but the last number, and so on down to the prior:

    p(v | s_1 .. s_j) = (n(s_1 .. s_j, v) + k p(v | s_1 .. s_j-1)) / (n(s_1 .. s_j) + k).

k and the weight of in-domain text are chosen on held-out text.

Shapes: ``T`` tokens of a sentence, ``N`` rows, ``r`` width of a row, ``S`` symbols, ``V``
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from privtune_flwr.audit.attacks.base import (
    Family,
    Level,
    PosteriorAttack,
    Released,
    Tell,
    silent,
)
from privtune_flwr.audit.attacks.levels import Levels
from privtune_flwr.audit.attacks.trained import divided

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair

#: Different rows at most; beyond them nearly every symbol would be new.
MOST_SYMBOLS = 4096
_BACKOFFS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_WEIGHTS = (1.0, 3.0, 10.0)
_PSEUDO_COUNT = 0.1


class Counts(PosteriorAttack):
    """Empirical Bayes over symbols.

    Parameters
    ----------
    level : Level
        ``adaptive`` at least: its text passes through the mechanism.
    tokens : int
        Of its own text at most.

    Raises
    ------
    ValueError
        If the level is ``unaware``.
    """

    family: ClassVar[Family] = "exact"

    def __init__(self, level: Level, *, tokens: int) -> None:
        if level == "unaware":
            raise ValueError("an attacker of level unaware cannot release text of its own")
        super().__init__(level)
        self._tokens = tokens

    @property
    def name(self) -> str:
        """``symbol-counts``."""
        return "symbol-counts"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Tokens."""
        return {"tokens": self._tokens}

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Count, and choose the smoothing.

        Raises
        ------
        ValueError
            If rows are no symbols, or there are too many different ones.
        """
        self._held_out, training = divided(knowledge.released(self._tokens))
        levels = Levels.of(np.concatenate([p.rows for p in training]))
        if levels is None or levels.symbols > MOST_SYMBOLS:
            raise ValueError("rows are not symbols, or too many different ones")
        self._levels, vocabulary = levels, len(knowledge.counts)
        inside = {id(ids) for ids in knowledge.in_domain}
        groups = [[p for p in training if (id(p.ids) in inside) is own] for own in (False, True)]
        tables = [self._counted(group, vocabulary) for group in groups]
        marginals = [
            np.bincount(np.concatenate([p.ids for p in group]), minlength=vocabulary)
            if group
            else np.zeros(vocabulary)
            for group in groups
        ]
        weights = _WEIGHTS if groups[0] and groups[1] else (1.0,)
        grid = list(product(weights, _BACKOFFS))
        scores = []
        for done, (weight, backoff) in enumerate(grid):
            self._take(marginals, tables, weight, backoff)
            scores.append(self._score(self._held_out))
            tell((done + 1) / len(grid))
        self._take(marginals, tables, *grid[int(np.argmax(scores))])

    def held_out(self, knowledge: Knowledge) -> list[Pair]:
        """Give the releases that were not counted."""
        return self._held_out

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | symbol of the row), (T, V)."""
        prefixes = self._prefixes(rows_TD)
        _, first, place_T = np.unique(prefixes[-1], return_index=True, return_inverse=True)
        share_UV = np.tile(np.exp(self._log_prior_V), (len(first), 1))
        for table_SV, prefix_T in zip(self._tables, prefixes, strict=True):
            seen_UV = table_SV[prefix_T[first]]
            total_U1 = np.asarray(seen_UV.sum(axis=1)).reshape(-1, 1)
            share_UV *= self._backoff
            share_UV += seen_UV.toarray()
            share_UV /= total_U1 + self._backoff
        log_UV = np.log(share_UV).astype(np.float32)
        return np.asarray(log_UV[place_T.reshape(-1)])

    def _prefixes(self, rows_NR: NDArray[np.float32]) -> list[NDArray[np.int64]]:
        """Give the number of the symbol made of the first number, of the first two, and so on."""
        places_NR, prefixes = self._levels.places(rows_NR), []
        symbol_N = np.zeros(len(rows_NR), dtype=np.int64)
        for size, place_N in zip(self._levels.sizes, places_NR.T, strict=True):
            symbol_N = symbol_N * size + place_N
            prefixes.append(symbol_N)
        return prefixes

    def _counted(self, pairs: Sequence[Pair], vocabulary: int) -> list[sparse.csr_array]:
        sizes = np.cumprod(self._levels.sizes)
        if not pairs:
            return [sparse.csr_array((int(size), vocabulary)) for size in sizes]
        ids_N = np.concatenate([p.ids for p in pairs]).astype(np.int64)
        prefixes = self._prefixes(np.concatenate([p.rows for p in pairs]))
        return [
            sparse.csr_array((np.ones(len(ids_N)), (prefix_N, ids_N)), (int(size), vocabulary))
            for size, prefix_N in zip(sizes, prefixes, strict=True)
        ]

    def _take(
        self,
        marginals: Sequence[NDArray[Any]],
        tables: Sequence[list[sparse.csr_array]],
        weight: float,
        backoff: float,
    ) -> None:
        """Weigh in-domain counts against public ones."""
        prior_V = marginals[0] + weight * marginals[1] + _PSEUDO_COUNT
        self._log_prior_V = np.log(prior_V / prior_V.sum())
        self._tables = [(a + weight * b).tocsr() for a, b in zip(*tables, strict=True)]
        self._backoff = backoff

    def _score(self, pairs: Sequence[Pair]) -> float:
        """Give the log-probability of the true tokens, nothing else computed."""
        ids_N = np.concatenate([p.ids for p in pairs]).astype(np.int64)
        share_N = np.exp(self._log_prior_V)[ids_N]
        prefixes = self._prefixes(np.concatenate([p.rows for p in pairs]))
        for table_SV, prefix_N in zip(self._tables, prefixes, strict=True):
            total_N = np.asarray(table_SV.sum(axis=1)).reshape(-1)[prefix_N]
            seen_N = np.asarray(table_SV[prefix_N, ids_N]).reshape(-1)
            share_N = (seen_N + self._backoff * share_N) / (total_N + self._backoff)
        return float(np.log(share_N).sum())
