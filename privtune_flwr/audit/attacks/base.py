"""What every attack on tokens is: fitted on what an attacker knows, then shown released rows.

Shapes: ``T`` tokens of one sentence, ``N`` rows of all sentences, ``d`` width of a row, ``V``
vocabulary, ``k`` guesses a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair

Level = Literal["unaware", "adaptive", "in-domain"]
LEVELS: dict[Level, str] = {
    "unaware": "knows the bottom model and public text, not the perturbation (the paper's kind)",
    "adaptive": "knows everything but the devices' secrets: also mechanism, strength and p*",
    "in-domain": "the adaptive one, who also owns text of the same source as the devices'",
}
Family = Literal["retrieval", "gaussian", "learned", "optimisation", "context", "exact"]
#: Told the share of an attack that is done, in [0, 1].
Tell = Callable[[float], None]


def silent(share: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Released:
    """Rows as the cloud holds them, sentence by sentence; nothing else of the sentences.

    Attributes
    ----------
    rows : list of float32 arrays (T, d)
        One array a sentence, special tokens' rows included.
    """

    rows: Sequence[NDArray[np.float32]]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return [len(rows) for rows in self.rows]

    @cached_property
    def stacked(self) -> NDArray[np.float32]:
        """All rows one after the other, (N, d)."""
        return np.concatenate([np.asarray(r, dtype=np.float32) for r in self.rows])

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Cut an array over all rows, (N, ...), into one a sentence, (T, ...)."""
        return np.split(values, np.cumsum(self.lengths)[:-1])


class Attack(ABC):
    """Guesses the token behind each released row.

    An attack is made with its level and settings, fitted once, then asked. What it may use is what
    :class:`~privtune_flwr.audit.knowledge.Knowledge` of its level gives it, and the released rows
    themselves.

    Parameters
    ----------
    level : Level
        How much the attacker knows.
    """

    #: What is alike in its method; the best of a family and level is what a table shows.
    family: ClassVar[Family]
    _made_for: tuple[Knowledge, Released] | None = None

    def __init__(self, level: Level) -> None:
        self.level = level

    @property
    @abstractmethod
    def name(self) -> str:
        """Method and variant, without the level."""

    @property
    def key(self) -> str:
        """Name and level: unique within an audit."""
        return f"{self.name}@{self.level}"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Whatever changes its result, for the report and for resuming."""
        return {}

    @property
    def sentences(self) -> int | None:
        """How many sentences it is shown at most; ``None`` for all."""
        return None

    @property
    def curve(self) -> dict[str, Any] | None:
        """What it watched while it was fitted: ``x``, ``y``, ``xlabel``, ``ylabel``."""
        return None

    def prepare(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Fit, unless fitted through here on these very objects: attacks may share an inner one."""
        made_for = (knowledge, released)
        if self._made_for is None or any(
            a is not b for a, b in zip(self._made_for, made_for, strict=True)
        ):
            self.fit(knowledge, released, tell)
            self._made_for = made_for

    @abstractmethod
    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Prepare.

        Parameters
        ----------
        knowledge : Knowledge
            Of this attack's level.
        released : Released
            The rows under attack; a cloud holds them all before it starts.
        tell : callable
            Told how far it is.
        """

    @abstractmethod
    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the likeliest tokens of each row, likeliest first.

        Returns
        -------
        list of int64 arrays (T, k)
            One a sentence.
        """


class PosteriorAttack(Attack):
    """An attack that can weigh the whole vocabulary for each row.

    Those serve as emissions of :class:`~privtune_flwr.audit.attacks.context.Context`.
    """

    @abstractmethod
    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | row, its sentence's rows), (T, V), of one whole sentence."""

    def log_prior(self) -> NDArray[np.float64]:
        """Give the log p(v), (V,), that :meth:`log_posterior` has in it, normalised."""
        return self._log_prior_V

    _log_prior_V: NDArray[np.float64]

    def held_out(self, knowledge: Knowledge) -> list[Pair] | None:
        """Give own releases it was not fitted on; ``None`` where it does not matter.

        By them :class:`~privtune_flwr.audit.attacks.context.Context` judges how far to believe it.
        """
        return None

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the likeliest tokens by the posterior."""
        guesses = []
        for index, rows_TD in enumerate(released.rows):
            posterior_TV = self.log_posterior(rows_TD)
            best = np.argpartition(-posterior_TV, np.arange(k), axis=1)[:, :k]
            guesses.append(best.astype(np.int64))
            tell((index + 1) / len(released.rows))
        return guesses


class TableAttack(PosteriorAttack):
    """Inverts the mechanism's own table: an attacker of level ``unaware`` does not know it.

    Raises
    ------
    ValueError
        If the level is ``unaware``.
    """

    family: ClassVar[Family] = "exact"

    def __init__(self, level: Level) -> None:
        if level == "unaware":
            raise ValueError("an attacker of level unaware does not know the mechanism's table")
        super().__init__(level)
