"""The defence-aware attack: everything is known but the device's secret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.privtune.posterior import ShiftPosterior

if TYPE_CHECKING:
    from privtune_flwr.privacy.base import Mechanism
    from privtune_flwr.privacy.public import PublicKnowledge


class Adaptive:
    """Guess the token with the largest posterior, given mechanism, shift and public text.

    It is the very object with which the cloud decodes, see
    :class:`~privtune_flwr.privacy.privtune.posterior.ShiftPosterior`. A lower bound on what leaks:
    it looks at one row at a time, and with words that public text lacks it has a poor mean.

    Parameters
    ----------
    posterior : ShiftPosterior
        Fitted.
    """

    name = "adaptive"

    def __init__(self, posterior: ShiftPosterior) -> None:
        self._posterior = posterior

    @classmethod
    def fit(cls, mechanism: Mechanism, public: PublicKnowledge) -> Self:
        """Fit on public text sent through the mechanism."""
        return cls(ShiftPosterior.fit(mechanism, public))

    def top(self, rows_ND: NDArray[Any], k: int = 1) -> NDArray[np.int64]:
        """List the most probable tokens, (N, k), of released rows (N, d)."""
        return self._posterior.top(rows_ND, k)
