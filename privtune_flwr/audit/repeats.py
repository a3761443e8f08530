"""What an attacker gains from seeing the same sentences more than once.

Releasing once is the default because independent noise averages out: of r releases the mean has a
r-th of the noise's covariance. Here that is measured, for one device that releases again and again
(:func:`averaging_curve`), and for what a cloud really holds (:func:`store_repeats`,
:func:`average_releases`). Two devices with the same sentences: :mod:`privtune_flwr.audit.linkage`.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Released, Tell, silent
from privtune_flwr.audit.measure import Figure, recovery
from privtune_flwr.privacy.base import Guarantee, Mechanism, MechanismError, MechanismSpec, Param
from privtune_flwr.privacy.privtune.posterior import ShiftPosterior

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from privtune_flwr.audit.knowledge import Pair
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge
    from privtune_flwr.training.store import SmashedStore

_FIT_ROWS = 10_000
_PER_EXAMPLE = tuple[str, int, int]  # device, chunk, position in the chunk

#: Fitted on a mechanism, guesses tokens (T, k) of what it released.
AttackGuess = Callable[[Mechanism, Released], list[NDArray[np.int64]]]


class Averaged(Mechanism):
    """The mean of r independent releases, seen as a mechanism of its own.

    So every attack that knows the mechanism fits itself to averaged releases without knowing that
    they are: its own text is perturbed r times and averaged before any covariance is taken.

    Parameters
    ----------
    mechanism : Mechanism
        What is released r times.
    releases : int
        r.
    """

    name: ClassVar[str] = "averaged"

    def __init__(self, mechanism: Mechanism, releases: int) -> None:
        if releases < 1:
            raise ValueError(f"releases = {releases}: at least one is needed")
        params: dict[str, Param] = {"of": mechanism.spec.id, "releases": releases}
        super().__init__(MechanismSpec(self.name, params, mechanism.spec.artefact))
        self.mechanism = mechanism
        self.releases = releases
        # as the class's, of which it is a view; a mechanism that reads tokens keeps its own model
        self.additive = mechanism.additive  # type: ignore[misc]
        self.reads = mechanism.reads  # type: ignore[misc]

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> NoReturn:
        """Refuse: it is a view of what another mechanism released."""
        raise MechanismError("averaged: is built from another mechanism, never designed")

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Refuse: no device runs it."""
        raise MechanismError("averaged: no device runs it")

    @property
    def eta_max(self) -> float | None:
        """Releases compose: r times the one of a single release."""
        one = self.mechanism.eta_max
        return None if one is None else one * self.releases

    def guarantee(self) -> Guarantee:
        """State what is left of the promise by composition."""
        one = self.mechanism.guarantee()
        words = f"{self.releases} releases of the same sentence, each so: {one.statement}"
        return Guarantee(one.metric, one.adversary, self.eta_max, words)

    def width(self, hidden_size: int) -> int:
        """Averaging keeps the width."""
        return self.mechanism.width(hidden_size)

    def shift(self) -> NDArray[np.floating[Any]] | None:
        """Averaging leaves the known mean of the noise as it is."""
        return self.mechanism.shift()

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        total_TR = np.zeros((len(hidden_TD), self.width(hidden_TD.shape[1])))
        for _ in range(self.releases):
            total_TR += self.mechanism.perturb(hidden_TD, ids_T, rng)
        return total_TR / self.releases


@dataclass(frozen=True)
class AveragingPoint:
    """What is recovered from the mean of ``releases`` releases."""

    releases: int
    top1: Figure
    content_top1: Figure


def gaussian_guess(public: PublicKnowledge) -> AttackGuess:
    """Give the adaptive Gaussian attack in the form :func:`averaging_curve` takes.

    Parameters
    ----------
    public : PublicKnowledge
        It is fitted anew, on this, for every number of releases.
    """

    def guess(mechanism: Mechanism, released: Released) -> list[NDArray[np.int64]]:
        posterior = ShiftPosterior.fit(mechanism, public, rows=_FIT_ROWS)
        return released.split(posterior.top(released.stacked, 1))

    return guess


def averaging_curve(
    mechanism: Mechanism,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    attack_guess: AttackGuess,
    *,
    releases: Sequence[int] = (1, 2, 4, 8, 16),
    seed: int = 0,
    tell: Tell = silent,
) -> list[AveragingPoint]:
    """Measure what an attacker recovers who averages over releases.

    Parameters
    ----------
    mechanism : Mechanism
        As the devices run it; every release has fresh noise.
    pairs : sequence of Pair
        The victims' clean rows and tokens; the attack sees only their averaged releases.
    tokenizer : PreTrainedTokenizerBase
        Tells special and content tokens.
    attack_guess : callable
        For example :func:`gaussian_guess`.
    releases : sequence of int
        Numbers of releases.
    seed : int
        Of noise and bootstrap.
    tell : callable
        Told how far it is.
    """
    points = []
    for index, number in enumerate(releases):
        averaged = Averaged(mechanism, number)
        released = Released(
            [
                averaged.perturb(pair.rows, pair.ids, np.random.default_rng([11, seed, number, i]))
                for i, pair in enumerate(pairs)
            ]
        )
        guesses = [g[:, 0] for g in attack_guess(averaged, released)]
        found = recovery([pair.ids for pair in pairs], guesses, tokenizer, seed=seed)
        points.append(
            AveragingPoint(
                number,
                Figure(found.all, *found.interval_all, found.n_all),
                Figure(found.content, *found.interval_content, found.n_content),
            )
        )
        tell((index + 1) / len(releases))
    return points


@dataclass(frozen=True)
class StoreRepeats:
    """How often the cloud holds the same sentence.

    Attributes
    ----------
    examples : int
        Training sentences of devices.
    fewest, most : int
        Releases held of one of them.
    mean : float
        The same on average.
    repeated : int
        Sentences held more than once.
    differing : int
        Those among them of which not all releases have the same bytes: only they average out.
    """

    examples: int
    fewest: int
    most: int
    mean: float
    repeated: int
    differing: int


def store_repeats(store: SmashedStore, *, split: str = "train") -> StoreRepeats:
    """Count releases of each example in a store.

    An example is a position in a device's chunk, since devices keep one order over epochs.

    Raises
    ------
    ValueError
        If the store holds no example of the split, or an example changed its length.
    """
    places = _releases(store, split)
    received = store.received()
    numbers = np.array([len(spans) for spans in places.values()])
    differing = sum(
        len({received[start:stop].tobytes() for start, stop in spans}) > 1
        for spans in places.values()
    )
    return StoreRepeats(
        examples=len(numbers),
        fewest=int(numbers.min()),
        most=int(numbers.max()),
        mean=float(numbers.mean()),
        repeated=int((numbers > 1).sum()),
        differing=differing,
    )


def average_releases(
    store: SmashedStore, *, split: str = "train"
) -> tuple[list[_PER_EXAMPLE], Released]:
    """Average each example's rows over the epochs that the store holds.

    Returns
    -------
    keys : list of (device, chunk, position)
        In the order of the rows.
    released : Released
        Mean rows, float32.

    Raises
    ------
    ValueError
        As :func:`store_repeats`.
    """
    places = _releases(store, split)
    received = store.received()
    rows = [
        np.mean([received[start:stop].astype(np.float32) for start, stop in spans], axis=0)
        for spans in places.values()
    ]
    return list(places), Released(rows)


def _releases(store: SmashedStore, split: str) -> dict[_PER_EXAMPLE, list[tuple[int, int]]]:
    """Find the rows (start, stop) of each example's releases."""
    places: dict[_PER_EXAMPLE, list[tuple[int, int]]] = {}
    for chunk in store:
        if chunk.split != split:
            continue
        for position, example in enumerate(store.examples(chunk.key)):
            span = (example.offset, example.offset + example.length)
            places.setdefault((chunk.device, chunk.chunk, position), []).append(span)
    if not places:
        raise ValueError(f"the store holds no example of the split {split}")
    if any(len({stop - start for start, stop in spans}) > 1 for spans in places.values()):
        raise ValueError("an example changed its length between releases")
    return places
