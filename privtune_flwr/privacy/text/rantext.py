"""The mechanism ``rantext``: a token is replaced within a random neighbourhood.

Tong et al., "InferDPT: Privacy-preserving Inference for Black-box Large Language Models", 2023. The
token's embedding gets Laplace noise in each coordinate, with scale (range of that coordinate over
the vocabulary) / F(epsilon); the tokens nearer to the clean embedding than the noisy one is are its
random adjacency list. One of them is drawn with probability proportional to
exp(epsilon u / 2), u = 1 - (its distance) / (the noisy one's).

F(epsilon) = epsilon below 2, else a ln(b epsilon + c) + e, with the constants that the authors
fitted to their embeddings and keep in their code. The noise does not depend on the token, so
neither does the radius: it is one random number of known law, and P(y | x) is a mixture over it.

The paper promises epsilon for each token. That does not follow: two tokens have different lists,
and a token beyond the radius has no probability at all. What does follow is in
:meth:`RanText.guarantee`. The authors' code also leaves out tokens that it does not know, which
changes the length, and replaces numbers by random ones; here every entry (a wordpiece) is treated
alike.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import (
    Guarantee,
    MechanismError,
    MechanismSpec,
    Param,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.text.base import (
    COMMON,
    EPSILON_RANGE,
    RowChannel,
    VectorRewrite,
    channel_blocks,
    draw_by_weight,
    read_vectors,
    token_blocks,
    write_vectors,
)
from privtune_flwr.privacy.text.vectors import Vectors, public_vectors

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

_FIT = (0.01658160142016071, 19.064721649556482, -38.1294334077209, 9.311083811697406)
_RADII_DRAWN = 32_768
_ENTRY_PAIRS = 1.2e10  # pairs times radii that a channel may cost: a minute on one core


class RanText(VectorRewrite):
    """Exponential mechanism over a random adjacency list.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    epsilon : float
        Of one token, as in the paper.
    delta : float
        Bound on what epsilon does not cover.
    special_S, table_VD
        See :class:`~privtune_flwr.privacy.text.base.VectorRewrite`.
    """

    name: ClassVar[str] = "rantext"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        epsilon: float,
        delta: float,
        special_S: NDArray[np.int64],
        table_VD: NDArray[np.float16],
    ) -> None:
        super().__init__(spec, special_S=special_S, table_VD=table_VD)
        self.epsilon = epsilon
        self.delta = delta
        self._scale_D = noise_scale(self.vectors, epsilon)

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Bound delta; the vectors are the artefact."""
        vectors, unit = public_vectors(public)
        epsilon = config.text.epsilon
        params: dict[str, Param] = {
            "epsilon": epsilon,
            "delta": min(1.0, 1.001 * shortfall(vectors, epsilon)),
        }
        return write_vectors(cls.name, folder, params, public=public, vectors=vectors, unit=unit)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; a delta smaller than the vectors admit is refused."""
        reader = ParamReader(spec, (*COMMON, "dimension", "epsilon", "delta"))
        epsilon = reader.real("epsilon", *EPSILON_RANGE)
        delta = reader.real("delta", 0, 1)
        tensors = read_vectors(reader, cls.name, artefact)
        vectors = Vectors(tensors["vectors"], tensors["special"])
        if delta < shortfall(vectors, epsilon):
            raise MechanismError(f"{cls.name}.delta = {delta:g}: the vectors need a larger one")
        return cls(
            spec,
            epsilon=epsilon,
            delta=delta,
            special_S=tensors["special"],
            table_VD=tensors["vectors"],
        )

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Say epsilon and delta as the specification does."""
        epsilon, delta = spec.params.get("epsilon"), spec.params.get("delta")
        if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
            return Strength()
        return Strength(epsilon=float(epsilon), delta=float(delta))

    @property
    def strength(self) -> Strength:
        """Epsilon with the delta that makes it true; a delta of 1 promises nothing."""
        return Strength(epsilon=self.epsilon, delta=self.delta)

    @property
    def eta_max(self) -> None:
        """None: the promise is not about a distance."""
        return None

    def guarantee(self) -> Guarantee:
        """State what holds where all lists coincide, and what the paper claims."""
        return Guarantee(
            metric="any two tokens",
            adversary="knows everything but the device's secret",
            eta=None,
            statement=f"If the random radius exceeds the distance of any two entries, every "
            "adjacency list is the whole vocabulary and one token is "
            f"{self.epsilon:.6g}-locally private. The radius falls short of that with probability "
            f"{self.delta:.6g} at most, which is the delta. Where the delta is 1 nothing is "
            "promised: given the radius, the ratio for a token in both lists is at most "
            f"exp({self.epsilon:.6g}) times the ratio of the lists' lengths, and a released token "
            "tells that the original was within the radius. The paper's claim of epsilon without "
            "a delta leaves this out. It composes over tokens and releases; lengths, order and "
            "special tokens are released as they are. A token is a vocabulary entry, a piece of a "
            "word. It holds for real arithmetic and ideal randomness; here: float64 and ChaCha20.",
        )

    def radii(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Draw norms of the noise: Laplace in each coordinate, one vector a token."""
        noise_ND = rng.laplace(size=(count, len(self._scale_D))) * self._scale_D
        return np.asarray(np.linalg.norm(noise_ND, axis=1))

    def _draw(self, ids_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        uniform_N, radius_N = rng.random(len(ids_N)), self.radii(rng, len(ids_N))
        new_N = ids_N.copy()
        for part in token_blocks(ids_N):
            distance = self.vectors.distances(ids_N[part])
            radius = radius_N[part, None]
            log_weights = self.epsilon / 2 * (1 - distance / radius)
            log_weights[(distance >= radius) | ~self.text_V] = -np.inf
            new_N[part] = draw_by_weight(log_weights, uniform_N[part])
        return new_N

    def _new_channel(self) -> RowChannel:
        return RanTextChannel(self)


class RanTextChannel(RowChannel):
    """The law as a mixture over equally likely radii: quadrature by quantiles.

    The radii are midpoint quantiles of draws at a fixed public seed. For each of them the law is
    exact and sums to one. How many there are depends on the vocabulary, since the normaliser of
    each entry at each radius is a sum over all entries: 512 for a few thousand entries, 12 for
    30,522. A probability that hangs on whether an entry is within the radius is thus known to one
    part in that number.
    """

    def __init__(self, mechanism: RanText) -> None:
        super().__init__(mechanism.text_V)
        self._vectors = mechanism.vectors
        self._epsilon = mechanism.epsilon
        nodes = int(np.clip(_ENTRY_PAIRS / len(mechanism.vectors) ** 2, 8, 512))
        rng = np.random.default_rng(0)
        drawn = np.concatenate([mechanism.radii(rng, 2048) for _ in range(_RADII_DRAWN // 2048)])
        self.radii_Q = np.quantile(drawn, (np.arange(nodes) + 0.5) / nodes)

    @cached_property
    def _log_normalisers(self) -> NDArray[np.float64]:
        """Of each entry at each radius, (Q, V)."""
        found = np.empty((len(self.radii_Q), len(self._vectors)))
        for block in channel_blocks(len(self._vectors)):
            distance = self._vectors.distances(block, np.float32)
            distance[:, ~self.text_V] = np.inf
            for q, radius in enumerate(self.radii_Q.astype(np.float32)):
                # own utility is 1, the largest; taken out so that nothing overflows
                weights = np.exp(distance * (-self._epsilon / 2 / radius))
                weights *= distance < radius
                total = weights.sum(axis=1, dtype=np.float64)
                # special entries may stand alone; no output is theirs, so any number will do
                found[q, block] = np.log(np.maximum(total, 1.0)) + self._epsilon / 2
        return found

    def _rows(self, outputs_U: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        distance = self._vectors.distances(outputs_U)
        total = np.full(distance.shape, -np.inf)
        for radius, log_normaliser_V in zip(self.radii_Q, self._log_normalisers, strict=True):
            term = self._epsilon / 2 * (1 - distance / radius) - log_normaliser_V
            term[distance >= radius] = -np.inf
            total = np.logaddexp(total, term)
        return np.asarray(total - math.log(len(self.radii_Q)))


def noise_scale(vectors: Vectors, epsilon: float) -> NDArray[np.float64]:
    """Give the Laplace scale of each coordinate, (d,).

    Raises
    ------
    MechanismError
        If all text entries coincide: there would be no neighbourhood.
    """
    rows_ND = vectors.table_VD[vectors.text_V].astype(np.float64)
    range_D = rows_ND.max(axis=0) - rows_ND.min(axis=0)
    if not range_D.any():
        raise MechanismError(f"{RanText.name}: all vectors coincide")
    slope, factor, offset, level = _FIT
    fitted = epsilon
    if epsilon >= 2:
        fitted = slope * math.log(factor * epsilon + offset) + level
    return np.asarray(range_D / fitted)


def shortfall(vectors: Vectors, epsilon: float) -> float:
    """Bound the probability that the radius does not exceed every distance of two text entries.

    The largest distance is bounded by the two largest distances from the mean; the lower tail of
    the squared radius, a sum of independent squared Laplace variables, by Chernoff:
    P(R^2 <= b^2) <= exp(t b^2) prod_i E exp(-t s_i^2 L^2) for any t > 0.
    """
    from scipy.special import erfcx

    rows_ND = vectors.table_VD[vectors.text_V].astype(np.float64)
    apart = np.linalg.norm(rows_ND - rows_ND.mean(axis=0), axis=1)
    bound = float(np.sort(apart)[-2:].sum())
    scale_D = noise_scale(vectors, epsilon)
    scale_D = scale_D[scale_D > 0]
    best = 0.0
    for t in np.logspace(-4, 8, 400) / bound**2:
        width_D = scale_D * math.sqrt(t)
        # E exp(-a^2 L^2) for a standard Laplace L, without overflow
        factor_D = math.sqrt(math.pi) / (2 * width_D) * erfcx(1 / (2 * width_D))
        best = min(best, t * bound**2 + float(np.log(factor_D).sum()))
    return math.exp(best)
