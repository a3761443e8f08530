"""The cloud's search without a gradient: CMA-ES that can be put down and taken up again.

Hansen and Ostermeier (2001), from the package ``cma``. Its own way to be saved is pickling, which
is code: a run folder is not trusted that far. What is kept are the losses that it was told. The
search is a function of them and the seed, so they are told again to a fresh one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.errors import RunError
from privtune_flwr.privacy.learning import State

_STREAM = 0xC3A
_TOLD, _LAST = "told", "last"
# the same arithmetic on the same machine gives the same numbers; another library's differ
_SAME = 1e-4


class Search:
    """Asks for candidates, is told their losses.

    Parameters
    ----------
    width : int
        Numbers that are searched; the start is 0.
    population : int
        Candidates a generation.
    sigma : float
        First step.
    seed : int
        Of the draws, which come from a generator of its own: numpy's global one is left alone.
    """

    def __init__(self, width: int, *, population: int, sigma: float, seed: int) -> None:
        import cma

        rng = np.random.default_rng([seed, _STREAM])
        options = {
            "popsize": population,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # nothing is seeded by cma
            "verbose": -9,
        }
        self._strategy: Any = cma.CMAEvolutionStrategy(np.zeros(width), sigma, options)
        self._asked: list[NDArray[np.float64]] = []
        self._told: list[NDArray[np.float32]] = []
        self._last: NDArray[np.float32] | None = None

    def candidates(self) -> NDArray[np.float32]:
        """Give this generation's candidates (population, width); the same until losses come."""
        if not self._asked:
            self._asked = self._strategy.ask()
        return np.stack(self._asked).astype(np.float32)

    def tell(self, losses: NDArray[np.float32]) -> None:
        """Take in the losses (population,) of :meth:`candidates`."""
        self._last = self.candidates()
        self._strategy.tell(self._asked, losses.astype(np.float64).tolist())
        self._told.append(losses.astype(np.float32))
        self._asked = []

    def mean(self) -> NDArray[np.float32]:
        """Give the mean of the search's distribution (width,): less noisy than the best seen."""
        found: NDArray[np.float32] = np.asarray(self._strategy.result.xfavorite, dtype=np.float32)
        return found

    def kept(self) -> State:
        """Give all losses (generations, population), and the candidates of the last of them."""
        if self._last is None:
            return {}
        return {_TOLD: np.stack(self._told), _LAST: self._last}

    def restore(self, kept: State) -> None:
        """Tell a fresh search what an earlier one was told.

        Raises
        ------
        RunError
            If that leads to other candidates: with another cma or numpy, say.
        """
        for losses in kept.get(_TOLD, ()):
            self.tell(losses)
        if _LAST in kept and (
            self._last is None
            or self._last.shape != kept[_LAST].shape
            or not np.allclose(self._last, kept[_LAST], rtol=_SAME, atol=_SAME)
        ):
            raise RunError(
                "the checkpoint's search cannot be continued: repeated here it asks for other "
                "candidates; use the same version of cma and numpy, or start anew"
            )
