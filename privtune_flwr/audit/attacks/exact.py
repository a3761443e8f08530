"""Exact MAP by inverting the table of a mechanism that releases one of finitely many rows.

Against such a mechanism no memoryless attacker does better, and what it recovers can be computed
without attacking. Gaussian attackers misjudge such releases badly, because the rows of one token
are a mixture of far-apart points.

Shapes: ``T`` tokens of a sentence, ``d`` width of a row, ``V`` vocabulary, ``C`` codewords.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import (
    Released,
    TableAttack,
    Tell,
    silent,
)
from privtune_flwr.audit.attacks.retrieval import NearestEntries

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge
    from privtune_flwr.privacy.base import Channel


class Exact(TableAttack):
    """Bayes' rule with the mechanism's own table: p(v | c) proportional to prior_v P(c | v).

    The symbol of a row is its nearest codeword, so that rounding on the wire does no harm.

    Parameters
    ----------
    level : Level
        ``adaptive`` at least: the unaware attacker does not know the table.

    Raises
    ------
    ValueError
        If the level is ``unaware``.
    """

    @property
    def name(self) -> str:
        """``exact-map``."""
        return "exact-map"

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Invert the table.

        Raises
        ------
        ValueError
            If the mechanism does not release one of finitely many rows.
        """
        channel = knowledge.mechanism.channel()
        if channel is None:
            raise ValueError(f"{knowledge.mechanism.name} has no table that could be inverted")
        self._log_prior_V = np.log(knowledge.prior)
        self._symbols = NearestEntries(channel.codebook_cd)
        self._log_posterior_CV = _inverted(channel, knowledge.prior)
        tell(1.0)

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | symbol of the row), (T, V); minus infinity where it cannot be v."""
        return self._log_posterior_CV[self._symbols.top(rows_TD)[:, 0]]


def expected_map_accuracy(
    channel: Channel, prior_V: NDArray[Any], frequency_V: NDArray[Any] | None = None
) -> float:
    """Compute from the table how often exact MAP is right.

    Parameters
    ----------
    channel : Channel
        The mechanism's.
    prior_V : array, shape (V,)
        What the attacker believes; weights.
    frequency_V : array, shape (V,), optional
        How often each token really is there; weights, zero for tokens that do not count. By
        default the attacker is right about them.

    Returns
    -------
    float
        sum_c frequency_v* P(c | v*) with v* the token that the attacker guesses from c.
    """
    weight_V = np.asarray(prior_V if frequency_V is None else frequency_V, dtype=np.float64)
    guess_C = _inverted(channel, np.asarray(prior_V, dtype=np.float64)).argmax(axis=1)
    right_C = weight_V[guess_C] * channel.table_vc[guess_C, np.arange(len(guess_C))]
    return float(right_C.sum() / weight_V.sum())


def _inverted(channel: Channel, prior_V: NDArray[np.float64]) -> NDArray[np.float32]:
    """Give log p(v | c), (C, V); the prior where no token could have made the symbol."""
    weight_CV = np.asarray(channel.table_vc, dtype=np.float64).T * prior_V
    never_C = weight_CV.sum(axis=1) == 0
    weight_CV[never_C] = prior_V
    with np.errstate(divide="ignore"):
        log_CV = np.log(weight_CV / weight_CV.sum(axis=1, keepdims=True))
    return np.asarray(log_CV, dtype=np.float32)
