"""The table of a mechanism that replaces tokens: read the replacement, then invert the table.

What is released is the bottom model's representation of the replaced sentence, which hides nothing
of the replacement o. So a clean Gaussian reads o, nearly without error, and Bayes' rule with the
mechanism's own law does the rest:

    p(v | y) proportional to prior_v sum_o p(y | o) P(o | v).

Shapes: ``T`` tokens of a sentence, ``N`` rows, ``d`` width of a row, ``V`` vocabulary, ``K``
candidates for the replacement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import (
    Released,
    TableAttack,
    Tell,
    silent,
)
from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior
from privtune_flwr.privacy.registry import create_mechanism

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge
    from privtune_flwr.privacy.base import TokenChannel

_CANDIDATES = 3
_FORGOTTEN = 1e-4  # a candidate this unlikely beside the first is left out
_MISREAD = 1e-6  # what a token keeps of its prior where the table says it cannot be
_FLAT = 0.5


class Table(TableAttack):
    """Bayes' rule with the law by which tokens are replaced.

    Parameters
    ----------
    level : Level
        ``adaptive`` at least: the unaware attacker takes the replacement for the token.

    Raises
    ------
    ValueError
        If the level is ``unaware``.
    """

    @property
    def name(self) -> str:
        """``table-of-tokens``."""
        return "table-of-tokens"

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Take the table; fit the clean Gaussian that reads replacements.

        Raises
        ------
        ValueError
            If the mechanism does not replace tokens.
        """
        channel = knowledge.mechanism.token_channel()
        if channel is None:
            raise ValueError(f"{knowledge.mechanism.name} has no table of tokens")
        self._channel: TokenChannel = channel
        self._log_prior_V = np.log(knowledge.prior)
        # replacements come from all over the vocabulary, not as words do in text
        prior_V = knowledge.prior * (1 - _FLAT) + _FLAT / len(knowledge.prior)
        nothing = create_mechanism(MechanismSpec("none"), None)
        self._reader = ShiftPosterior.fit(nothing, knowledge.public).with_prior(prior_V)
        self._reader_prior_V = torch.tensor(np.log(prior_V), dtype=torch.float32)
        tell(1.0)

    def replaced(self, rows_TD: NDArray[np.float32]) -> NDArray[np.int64]:
        """Read the replaced tokens, (T,): what the unaware attacker would stop at."""
        return self._reader.top(rows_TD, 1)[:, 0]

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | row), (T, V)."""
        read_TV = torch.from_numpy(self._reader.log_posterior(rows_TD))
        read_TK, token_TK = read_TV.topk(_CANDIDATES, dim=1)
        weight_TK = read_TK - self._reader_prior_V[token_TK]
        weight_TK = (weight_TK - weight_TK.amax(dim=1, keepdim=True)).exp()
        weight_TK[weight_TK < _FORGOTTEN] = 0
        share_TK = (weight_TK / weight_TK.sum(dim=1, keepdim=True)).numpy()
        asked_U, place_TK = np.unique(token_TK.numpy(), return_inverse=True)
        place_TK = place_TK.reshape(share_TK.shape)
        needed_U = np.zeros(len(asked_U), dtype=bool)
        needed_U[place_TK[share_TK > 0]] = True
        likelihood_UV = np.zeros((len(asked_U), len(self._log_prior_V)), np.float32)
        likelihood_UV[needed_U] = np.exp(self._channel.log_likelihood(asked_U[needed_U]))
        mixed_TV = np.zeros((len(rows_TD), len(self._log_prior_V)), np.float32)
        for candidate in range(_CANDIDATES):
            rows = np.flatnonzero(share_TK[:, candidate])
            mixed_TV[rows] += (
                share_TK[rows, candidate, None] * likelihood_UV[place_TK[rows, candidate]]
            )
        prior_V = np.exp(self._log_prior_V).astype(np.float32)
        mixed_TV *= prior_V
        total_T1 = mixed_TV.sum(axis=1, keepdims=True)
        # where no token could have become what was read, nothing is left but the prior
        mixed_TV /= np.maximum(total_T1, np.finfo(np.float32).tiny)
        posterior_TV = mixed_TV * (1 - _MISREAD) + _MISREAD * prior_V
        posterior_TV /= posterior_TV.sum(axis=1, keepdims=True)
        return np.asarray(np.log(posterior_TV), dtype=np.float32)
