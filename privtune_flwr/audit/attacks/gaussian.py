"""One Gaussian a token with a common covariance: linear discriminant analysis.

The class means are noise-free (bank plus known shift), the covariance is that of the attacker's own
releases. Against additive noise around known means there is little that a memoryless attacker could
do better; what it lacks is context, see :mod:`privtune_flwr.audit.attacks.context`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Family, PosteriorAttack, Released, Tell, silent

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge


class Gaussian(PosteriorAttack):
    """The posterior with which the cloud decodes, used to read.

    See :class:`~privtune_flwr.privacy.privtune.posterior.ShiftPosterior` for the formula.
    """

    family: ClassVar[Family] = "gaussian"

    @property
    def name(self) -> str:
        """``gaussian``."""
        return "gaussian"

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Estimate means, covariance and prior from the attacker's own text."""
        self._posterior = knowledge.posterior()
        self._log_prior_V = np.log(knowledge.prior)
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the most probable tokens."""
        guesses = self._posterior.top(released.stacked, k)
        tell(1.0)
        return released.split(guesses)

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | row), (T, V)."""
        return self._posterior.log_posterior(rows_TD)
