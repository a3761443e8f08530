"""The mechanism ``dp-forward``: a whole sentence's matrix under local differential privacy.

Du et al., "DP-Forward: fine-tuning and inference on language models with differential privacy in
forward pass", CCS 2023: a sentence's (T, d) matrix is normalised to Frobenius norm at most C, so
that two differ by at most 2C, and gets noise U N V^T with N standard normal (a matrix normal),
calibrated by the analytic condition: 2C over the product of the smallest singular values of U and V
must not exceed the largest ratio that :func:`~privtune_flwr.privacy.analytic.largest_ratio` gives.

Here U = I and V = sigma I. Nothing but C is known of a sentence's matrix, so the condition sees the
smallest singular values alone, and any other shape with the same guarantee only adds noise.

Lengths are public in this project: adjacency is between any two sentences of the same number of
tokens, and C may depend on T. C = clip sqrt(T) holds a sentence to a root mean square row norm
``clip`` and gives all lengths the same ratio of C to what their rows carry.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.analytic import DELTA_RANGE, EPSILON_RANGE, largest_ratio
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.dchi import DIMENSION_RANGE

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

CLIP_RANGE = (1e-9, 1e9)


class DPForward(Mechanism):
    """Normalise a sentence's matrix, add calibrated normal noise, scale it back.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    epsilon, delta : float
        Of one release of one sentence.
    clip : float
        Largest root mean square of a sentence's row norms.
    dimension : int
        d.
    """

    name: ClassVar[str] = "dp-forward"
    additive: ClassVar[bool] = False

    def __init__(
        self, spec: MechanismSpec, *, epsilon: float, delta: float, clip: float, dimension: int
    ) -> None:
        super().__init__(spec)
        self.epsilon = epsilon
        self.delta = delta
        self.clip = clip
        self.dimension = dimension
        self._noise_multiplier = 1 / largest_ratio(epsilon, delta)

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Take epsilon and delta as asked, and the clip from public rows if none is set.

        There is no artefact. ``unit`` is 0: released rows are scaled, so that their distance from
        the clean ones does not tell how strong the noise is. ``privacy.noise`` is not used.

        Raises
        ------
        MechanismError
            If ``privacy.eta`` is set, which this noise has none of.
        """
        if config.eta > 0:
            raise MechanismError(f"{cls.name}: has no eta; set privacy.siblings.epsilon instead")
        return MechanismSpec(
            cls.name,
            {
                "epsilon": config.siblings.epsilon,
                "delta": config.siblings.delta,
                "clip": config.siblings.clip or _public_row_norm(public),
                "dimension": public.hidden_size,
                "unit": 0.0,
            },
        )

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; the device itself calibrates the noise."""
        reader = ParamReader(spec, ("epsilon", "delta", "clip", "dimension", "unit"))
        reader.real("unit", 0, 0)
        return cls(
            spec,
            epsilon=reader.real("epsilon", *EPSILON_RANGE),
            delta=reader.real("delta", *DELTA_RANGE),
            clip=reader.real("clip", *CLIP_RANGE),
            dimension=reader.integer("dimension", *DIMENSION_RANGE),
        )

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Say what the specification itself determines: there is no artefact."""
        return cls.load(spec, None).strength

    @property
    def eta_max(self) -> None:
        """None: the promise is in epsilon and delta."""
        return None

    @property
    def strength(self) -> Strength:
        """Epsilon and delta of a sentence."""
        return Strength(epsilon=self.epsilon, delta=self.delta, per="sentence")

    def sigma(self, tokens: int) -> float:
        """Give the standard deviation of the noise in each coordinate, before scaling.

        Parameters
        ----------
        tokens : int
            T. Sensitivity is 2C with C = clip sqrt(T).
        """
        return 2 * self.clip * math.sqrt(tokens) * self._noise_multiplier

    def gain(self, tokens: int) -> float:
        """Give the factor after the noise: rows get root mean square norm ``clip`` at most.

        It depends on public things alone: post-processing, so that the top model sees rows of the
        size it knows.
        """
        return self.clip / math.hypot(self.clip, self.sigma(tokens) * math.sqrt(self.dimension))

    def guarantee(self) -> Guarantee:
        """State local differential privacy of a sentence, and what it costs."""
        per_row = 2 * self._noise_multiplier * math.sqrt(self.dimension)
        return Guarantee(
            metric="Frobenius norm of the difference of two sentences' matrices, at most 2C",
            adversary="knows everything but the device's secret",
            eta=None,
            statement=f"One released sentence is ({self.epsilon:.6g}, {self.delta:g})-locally "
            "differentially private against any other of the same number of tokens T, whatever "
            "its words; T itself is public. The sentence's matrix is normalised to Frobenius norm "
            f"C = {self.clip:.6g} sqrt(T) at most, sensitivity is 2C, and the noise is normal with "
            "independent coordinates (a matrix normal with identity covariances), calibrated by "
            f"the analytic condition: its norm is about {per_row:.4g} sqrt(T) times that of a row. "
            "Rows are then scaled by a factor that depends on T alone, which is post-processing. "
            "It composes over releases and over the sentences of a person. It holds for real "
            "arithmetic and ideal randomness; here: float64 and ChaCha20.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        tokens, dimension = hidden_TD.shape
        if dimension != self.dimension:
            raise MechanismError(
                f"{self.name}.dimension = {self.dimension}: the representations have {dimension}"
            )
        bound = self.clip * math.sqrt(tokens)
        norm = float(np.linalg.norm(hidden_TD))
        bounded_TD = hidden_TD * (bound / norm) if norm > bound else hidden_TD
        noise_TD = self.sigma(tokens) * rng.standard_normal(hidden_TD.shape)
        return self.gain(tokens) * (bounded_TD + noise_TD)


def _public_row_norm(public: PublicKnowledge) -> float:
    values_ND = public.rows().values
    return float(np.sqrt(np.square(values_ND, dtype=np.float64).sum(axis=1).mean()))
