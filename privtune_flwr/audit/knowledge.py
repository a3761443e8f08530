"""What an attacker knows beside the released rows, by level.

One cloud, one knowledge: bottom model, tokenizer, public text and, from the level ``adaptive`` on,
the mechanism with all its parameters. Only the devices' secrets are never here.

Shapes: ``T`` tokens of one sentence, ``N`` rows, ``d`` hidden size, ``r`` width of a released row,
``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Level
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.released import ReleasedLaw, released_law

if TYPE_CHECKING:
    from privtune_flwr.models import BottomModel
    from privtune_flwr.privacy.base import Mechanism
    from privtune_flwr.privacy.public import PublicKnowledge

_PSEUDO_COUNT = 0.1
_RIDGE = 0.01
_COVARIANCE_TOKENS = 40_000


class Pair(NamedTuple):
    """One sentence of the attacker's own: what would have been released, and its tokens."""

    rows: NDArray[np.float32]  # (T, d), or (T, r) once released
    ids: NDArray[np.int32]  # (T,)


@dataclass
class Knowledge:
    """Everything an attacker of one level may use.

    Attributes
    ----------
    level : Level
        ``unaware``: ``pairs`` are clean and ``shift`` is nothing.
    bottom : BottomModel
        The frozen bottom model.
    public : PublicKnowledge
        Public text: bank, counts, sequences.
    mechanism : Mechanism
        Never looked at by the level ``unaware``.
    in_domain : sequence of int32 arrays (T,)
        Text of the devices' own source that no device holds; empty below the level ``in-domain``.
    """

    level: Level
    bottom: BottomModel
    public: PublicKnowledge
    mechanism: Mechanism
    in_domain: Sequence[NDArray[np.int32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.level != "in-domain" and self.in_domain:
            raise ValueError(f"level {self.level} knows no in-domain text")

    @property
    def aware(self) -> bool:
        """Whether the mechanism is known."""
        return self.level != "unaware"

    @property
    def additive(self) -> bool:
        """Whether the attacker may take rows for clean ones plus a shift and noise.

        The unaware one always does.
        """
        return not self.aware or self.mechanism.additive

    @cached_property
    def shift(self) -> NDArray[np.float32] | None:
        """Known mean of the noise for each token, (V, d); ``None``: there is none, or unknown."""
        shift = self.mechanism.shift() if self.aware else None
        return None if shift is None else np.asarray(shift, dtype=np.float32)

    @cached_property
    def sequences(self) -> list[NDArray[np.int32]]:
        """The attacker's own sentences: public ones, then in-domain ones."""
        return [*self.public.sequences, *self.in_domain]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Occurrences of each token in the attacker's own text, (V,)."""
        ids = [np.asarray(s, dtype=np.int64) for s in self.in_domain]
        extra = np.bincount(np.concatenate(ids), minlength=len(self.public.counts)) if ids else 0
        return np.asarray(self.public.counts + extra)

    @property
    def prior(self) -> NDArray[np.float64]:
        """Smoothed token frequencies of that text, (V,), summing to one."""
        weights_V = self.counts.astype(np.float64) + _PSEUDO_COUNT
        return np.asarray(weights_V / weights_V.sum())

    @cached_property
    def clean_means(self) -> NDArray[np.float32]:
        """Mean clean representation of each token over all the attacker's text, (V, d)."""
        bank = np.asarray(self.public.bank, dtype=np.float32)
        if not self.in_domain:
            return bank
        counts_V = self.public.counts.astype(np.float64)
        sums_VD = bank * counts_V[:, None]
        for ids, rows in zip(self.in_domain, self._clean_in_domain, strict=True):
            np.add.at(sums_VD, np.asarray(ids), rows)
        total_V = self.counts
        seen_V = total_V > 0
        means = bank.copy()
        means[seen_V] = sums_VD[seen_V] / total_V[seen_V, None]
        return means

    @property
    def means(self) -> NDArray[np.float32]:
        """Where the attacker expects released rows of each token, (V, r)."""
        if not self.additive:
            return self._law.means_VR
        if self.shift is None:
            return self.clean_means
        return self.clean_means + self.shift

    def posterior(self) -> ShiftPosterior:
        """Fit one Gaussian a token with a common covariance to the attacker's own releases.

        At the level ``adaptive`` this is the very object with which the cloud decodes.
        """
        if self.level == "adaptive":
            return ShiftPosterior.fit(self.mechanism, self.public)
        if not self.additive:
            return ShiftPosterior(self._law.means_VR, self._law.covariance_RR, self.prior)
        covariance_DD = self._covariance(_COVARIANCE_TOKENS)
        return ShiftPosterior(self.means, covariance_DD, self.prior)

    def pairs(self, tokens: int, *, seed: int = 0) -> list[Pair]:
        """Pass sentences of the attacker's own through the bottom model and the known mechanism.

        Below ``adaptive`` the rows are clean. In-domain sentences come first: they are worth most.
        Public ones are encoded once and kept on disk.

        Parameters
        ----------
        tokens : int
            At most, and at least one sentence.
        seed : int
            Of the choice of sentences only, so that noise is fresh for every call of
            :meth:`perturb`.
        """
        return [Pair(self.perturb(p, i), p.ids) for i, p in enumerate(self.clean(tokens, seed))]

    def released(self, tokens: int) -> list[Pair]:
        """Give pairs as :meth:`pairs` does, drawn once and shared by the attacks that ask."""
        if tokens not in self._released:
            self._released[tokens] = self.pairs(tokens)
        return self._released[tokens]

    def clean(self, tokens: int, seed: int = 0) -> list[Pair]:
        """Give clean pairs; see :meth:`pairs`."""
        own = [Pair(r, i) for r, i in zip(self._clean_in_domain, self.in_domain, strict=True)]
        rows = self.public.rows(tokens)
        ends = np.cumsum(rows.lengths)[:-1]
        parts = zip(np.split(rows.values, ends), np.split(rows.ids, ends), strict=True)
        public = [Pair(values, ids) for values, ids in parts]
        order = np.random.default_rng(seed).permutation(len(public))
        chosen = [*own, *(public[int(i)] for i in order)]
        total = np.cumsum([len(pair.ids) for pair in chosen])
        return chosen[: max(1, int(np.searchsorted(total, tokens, side="right")))]

    def perturb(self, pair: Pair, *identity: int) -> NDArray[np.float32]:
        """Release a clean pair as a device would, if the attacker knows how.

        Parameters
        ----------
        pair : Pair
            Clean rows.
        *identity : int
            Another identity, another draw. Not secret: the attacker's own simulation.
        """
        if not self.aware:
            return pair.rows
        rng = np.random.default_rng([7, *identity])
        return self.mechanism.perturb(pair.rows, pair.ids, rng)

    @cached_property
    def _law(self) -> ReleasedLaw:
        """Means and covariance of a mechanism that is not additive, from own releases."""
        own = (
            (self.perturb(Pair(rows, ids), 5, n), ids)
            for n, (rows, ids) in enumerate(zip(self._clean_in_domain, self.in_domain, strict=True))
        )
        return released_law(self.mechanism, self.public, rows=_COVARIANCE_TOKENS, own=own)

    @cached_property
    def _released(self) -> dict[int, list[Pair]]:
        return {}

    @cached_property
    def _clean_in_domain(self) -> list[NDArray[np.float32]]:
        return self.bottom.encode(list(self.in_domain))

    def _covariance(self, tokens: int) -> NDArray[np.float64]:
        pairs = self.pairs(tokens)
        rows_ND = np.concatenate([pair.rows for pair in pairs]).astype(np.float64)
        rows_ND -= self.means[np.concatenate([pair.ids for pair in pairs])]
        covariance_DD: NDArray[np.float64] = rows_ND.T @ rows_ND / len(rows_ND)
        width = len(covariance_DD)
        return covariance_DD + _RIDGE * np.mean(np.diag(covariance_DD)) * np.eye(width)
