"""The mechanism ``none``: representations leave as they are. A baseline, never a protection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import Guarantee, Mechanism, MechanismSpec, ParamReader

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge


class Identity(Mechanism):
    """Release clean representations: measures what perturbation costs."""

    name: ClassVar[str] = "none"

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Give the specification; there is nothing to choose."""
        return MechanismSpec(cls.name)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; refuses any parameter."""
        ParamReader(spec, ())
        return cls(spec)

    @property
    def eta_max(self) -> None:
        """None: nothing is promised."""
        return None

    def guarantee(self) -> Guarantee:
        """Say that there is none."""
        return Guarantee(
            metric="none",
            adversary="any",
            eta=None,
            statement="No protection: clean representations are released, and the text can be "
            "read back from them.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        return hidden_TD
