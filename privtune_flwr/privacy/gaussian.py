"""The mechanism ``gaussian``: isotropic normal noise on each token's representation.

What much of the literature on split learning adds. Its strength is given like that of ``dchi``, as
the mean norm of the noise in units, so that the two can be compared. Representations have no bound,
so that normal noise alone is no local differential privacy; with rows clipped to a norm it is, and
the exact epsilon follows from :mod:`~privtune_flwr.privacy.analytic`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.analytic import DELTA_RANGE, gaussian_epsilon
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.dchi import DIMENSION_RANGE, UNIT_RANGE, resolve_eta

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

SIGMA_RANGE = (1e-9, 1e9)
CLIP_RANGE = (0.0, 1e9)


def mean_norm(dimension: int) -> float:
    """Give E||z|| of z ~ N(0, I) in ``dimension`` dimensions, close to its square root."""
    half = dimension / 2
    return math.sqrt(2) * math.exp(math.lgamma(half + 0.5) - math.lgamma(half))


def clip_rows(rows_TD: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    """Shorten rows that are longer than ``clip`` (L2) to that length; 0 leaves all as they are."""
    if clip == 0:
        return rows_TD
    norm_T1 = np.linalg.norm(rows_TD, axis=1, keepdims=True)
    clipped_TD: NDArray[np.float64] = rows_TD * (clip / np.maximum(norm_T1, clip))
    return clipped_TD


class Gaussian(Mechanism):
    """Release each row, clipped if a clip is set, plus N(0, sigma^2 I).

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    sigma : float
        Standard deviation of each coordinate.
    dimension : int
        d.
    clip : float
        Largest L2 norm of a row before noise; 0 = no bound.
    delta : float
        At which epsilon is told.
    """

    name: ClassVar[str] = "gaussian"

    def __init__(
        self, spec: MechanismSpec, *, sigma: float, dimension: int, clip: float, delta: float
    ) -> None:
        super().__init__(spec)
        self.sigma = sigma
        self.dimension = dimension
        self.clip = clip
        self.delta = delta
        if clip > 0:  # a clipped row is not the clean one plus noise of mean zero
            self.additive = False  # type: ignore[misc]

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Give sigma the value at which E||z|| is ``noise`` units; there is no artefact.

        Raises
        ------
        MechanismError
            If ``privacy.eta`` is set, which this noise has none of.
        """
        if config.eta > 0:
            raise MechanismError(f"{cls.name}: has no eta; set privacy.noise instead")
        _, unit = resolve_eta(config, public)
        return MechanismSpec(
            cls.name,
            {
                "sigma": config.noise * unit / mean_norm(public.hidden_size),
                "dimension": public.hidden_size,
                "unit": unit,
                "clip": config.siblings.clip,
                "delta": config.siblings.delta,
            },
        )

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from a specification received from the cloud."""
        reader = ParamReader(spec, ("sigma", "dimension", "unit", "clip", "delta"))
        reader.real("unit", *UNIT_RANGE)
        return cls(
            spec,
            sigma=reader.real("sigma", *SIGMA_RANGE),
            dimension=reader.integer("dimension", *DIMENSION_RANGE),
            clip=reader.real("clip", *CLIP_RANGE),
            delta=reader.real("delta", *DELTA_RANGE),
        )

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Say what the specification itself determines: there is no artefact."""
        return cls.load(spec, None).strength

    @property
    def eta_max(self) -> None:
        """None: normal noise is not d_chi-private, its log-ratio grows with the output."""
        return None

    @property
    def strength(self) -> Strength:
        """Epsilon of a token at ``delta``, with rows clipped; else nothing is bounded."""
        if self.clip == 0:
            return Strength()
        return Strength(
            epsilon=gaussian_epsilon(2 * self.clip / self.sigma, self.delta), delta=self.delta
        )

    def guarantee(self) -> Guarantee:
        """State the exact condition for two representations, and the uniform bound if any."""
        unit = float(self.spec.params["unit"])
        one = gaussian_epsilon(unit / self.sigma, self.delta)
        epsilon = self.strength.epsilon
        uniform = (
            "Rows are not clipped, so that distances have no bound and there is no local "
            "differential privacy that holds for all."
            if epsilon is None
            else f"Rows are clipped to norm {self.clip:.6g}, so that any two differ by at most "
            f"twice that: one released token is ({epsilon:.6g}, {self.delta:g})-locally "
            "differentially private."
        )
        return Guarantee(
            metric="Euclidean distance of two representations at the cut",
            adversary="knows everything but the device's secret",
            eta=None,
            statement=f"Normal noise of standard deviation {self.sigma:.6g} in each of "
            f"{self.dimension} coordinates. Two representations at distance D are (epsilon, "
            "delta)-indistinguishable exactly if Phi(r/2 - epsilon/r) - exp(epsilon) "
            f"Phi(-r/2 - epsilon/r) <= delta with r = D / {self.sigma:.6g}; at D = one unit "
            f"({unit:.6g}) and delta = {self.delta:g} this is epsilon = {one:.6g}. {uniform} "
            "It composes over the tokens of a sentence and over releases. Above cut 0 a "
            "representation carries its context, so neighbours are sequences rather than words.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        if hidden_TD.shape[1] != self.dimension:
            raise MechanismError(
                f"{self.name}.dimension = {self.dimension}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        noise_TD = rng.standard_normal(hidden_TD.shape)
        return clip_rows(hidden_TD, self.clip) + self.sigma * noise_TD
