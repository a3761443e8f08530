"""The mechanism ``dchi``: isotropic noise with density proportional to exp(-eta ||z||).

Metric differential privacy over Euclidean space: Chatzikokolakis et al., "Broadening the scope of
differential privacy using metrics", PETS 2013; for word representations Feyisetan et al., WSDM
2020. The norm of such noise in d dimensions follows Gamma(shape d, scale 1/eta), its direction is
uniform on the sphere. Two errors in public code are avoided, and tested for: a Gamma draw for each
coordinate, and one radius for a whole batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    ParamReader,
)

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

ETA_RANGE = (1e-9, 1e9)
DIMENSION_RANGE = (1, 65_536)
UNIT_RANGE = (1e-9, 1e9)


def sample_dchi(
    rng: np.random.Generator, tokens: int, dimension: int, eta: float
) -> NDArray[np.float64]:
    """Draw d_chi noise: an own radius and an own direction for each token.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of randomness.
    tokens, dimension : int
        T and d.
    eta : float
        Inverse length. E||z|| = d / eta, with relative spread 1/sqrt(d).

    Returns
    -------
    float64 array, shape (T, d)
        r u with r ~ Gamma(shape d, scale 1/eta) and u uniform on the unit sphere.
    """
    radius_T = rng.standard_gamma(dimension, size=tokens) / eta
    direction_TD = rng.standard_normal((tokens, dimension))
    direction_TD *= (radius_T / np.linalg.norm(direction_TD, axis=1))[:, None]
    return direction_TD


def resolve_eta(config: PrivacyConfig, public: PublicKnowledge) -> tuple[float, float]:
    """Give (eta, unit): ``config.eta`` if set, else the eta with E||r u|| = noise units.

    Raises
    ------
    MechanismError
        If the bank is degenerate, so that its unit is zero or not finite.
    """
    unit = public.unit
    if not (np.isfinite(unit) and unit > 0):
        raise MechanismError(f"the bank's unit is {unit}: entries coincide or are not finite")
    eta = config.eta if config.eta > 0 else public.hidden_size / (config.noise * unit)
    return float(eta), float(unit)


class DChi(Mechanism):
    """d_chi-private noise of mean zero: the classical local mechanism, and a baseline.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    eta : float
        Inverse length.
    dimension : int
        d.
    """

    name: ClassVar[str] = "dchi"

    def __init__(self, spec: MechanismSpec, *, eta: float, dimension: int) -> None:
        super().__init__(spec)
        self.eta = eta
        self.dimension = dimension

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Resolve eta from the configuration and the bank's unit; there is no artefact."""
        eta, unit = resolve_eta(config, public)
        return MechanismSpec(cls.name, {"eta": eta, "dimension": public.hidden_size, "unit": unit})

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from a specification received from the cloud."""
        reader = ParamReader(spec, ("eta", "dimension", "unit"))
        reader.real("unit", *UNIT_RANGE)
        return cls(
            spec,
            eta=reader.real("eta", *ETA_RANGE),
            dimension=reader.integer("dimension", *DIMENSION_RANGE),
        )

    @property
    def eta_max(self) -> float:
        """The one eta of all tokens."""
        return self.eta

    def guarantee(self) -> Guarantee:
        """State d_chi-privacy at the cut, per token and release."""
        return Guarantee(
            metric="Euclidean distance of two representations at the cut",
            adversary="knows everything but the device's secret",
            eta=self.eta,
            statement=f"For one released token, densities at any output differ by a factor of at "
            f"most exp({self.eta:.6g} * distance) between any two clean representations. It "
            "composes over the tokens of a sentence and over releases. Above cut 0 a "
            "representation carries its context, so neighbours are sequences rather than words. "
            "It holds for real arithmetic and ideal randomness; here: float64 and ChaCha20.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        if hidden_TD.shape[1] != self.dimension:
            raise MechanismError(
                f"{self.name}.dimension = {self.dimension}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        return hidden_TD + sample_dchi(rng, len(hidden_TD), self.dimension, self.eta)
