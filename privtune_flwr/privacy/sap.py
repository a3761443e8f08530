"""The mechanism ``sap``: d_chi noise, less of it on tokens that the task needs.

Shen et al., "A Split-and-Privatize Framework for Large Language Model Fine-Tuning", 2023: token
representations get d_chi noise at the cut, and tokens that contribute to the task are identified
and distorted less. How they are identified is a *reconstruction* here: the share ``contributing``
of the vocabulary with the highest public importance
(:func:`~privtune_flwr.privacy.privtune.importance.importance`), from public text alone, since a
choice made from private text would point at its words. Contributing tokens get eta times
``relief``, all others eta.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.artefact import read_tensors
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    Param,
    ParamReader,
)
from privtune_flwr.privacy.dchi import (
    DIMENSION_RANGE,
    ETA_RANGE,
    UNIT_RANGE,
    resolve_eta,
    sample_dchi,
)

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

TENSORS = "sap.safetensors"
_VOCABULARY_RANGE = (2, 10_000_000)
_RELIEF_RANGE = (1.0, 100.0)


class SAP(Mechanism):
    """Add d_chi noise with one eta for contributing tokens and one for all others.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    eta : float
        Inverse length for ordinary tokens.
    relief : float
        Factor on eta for contributing tokens, at least 1.
    contributing_V : bool array, shape (V,)
        Which tokens contribute.
    dimension : int
        d.
    """

    name: ClassVar[str] = "sap"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        eta: float,
        relief: float,
        contributing_V: NDArray[np.bool_],
        dimension: int,
    ) -> None:
        super().__init__(spec)
        self.eta = eta
        self.relief = relief
        self.dimension = dimension
        self._contributing_V = contributing_V

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Resolve eta as ``dchi`` does, choose the contributing tokens, write them down."""
        from safetensors.numpy import save_file

        eta, unit = resolve_eta(config, public)
        share = config.siblings.contributing
        tables = public.cached("sap", {"contributing": share}, lambda: _tables(public, share))
        save_file({name: np.array(table) for name, table in tables.items()}, folder / TENSORS)
        params: dict[str, Param] = {
            "eta": eta,
            "relief": config.siblings.relief,
            "contributing": share,
            "unit": unit,
            "dimension": public.hidden_size,
            "vocabulary": public.vocab_size,
        }
        return MechanismSpec(cls.name, params, Manifest.of(folder).id)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; whatever the artefact says, no eta exceeds eta times relief."""
        reader = ParamReader(
            spec, ("eta", "relief", "contributing", "unit", "dimension", "vocabulary")
        )
        reader.real("unit", *UNIT_RANGE)
        reader.real("contributing", 0, 1)
        vocabulary = reader.integer("vocabulary", *_VOCABULARY_RANGE)
        wanted = {"contributing": (np.uint8, (vocabulary,))}
        contributing_V = read_tensors(cls.name, artefact, TENSORS, wanted)["contributing"]
        if contributing_V.max() > 1:
            raise MechanismError(f"{cls.name}: artefact tensor 'contributing' must be 0 or 1")
        return cls(
            spec,
            eta=reader.real("eta", *ETA_RANGE),
            relief=reader.real("relief", *_RELIEF_RANGE),
            contributing_V=contributing_V.astype(np.bool_),
            dimension=reader.integer("dimension", *DIMENSION_RANGE),
        )

    @classmethod
    def declared_eta(cls, spec: MechanismSpec) -> float | None:
        """Bound eta by eta times relief, which a contributing token has."""
        eta, relief = spec.params.get("eta"), spec.params.get("relief")
        if not isinstance(eta, int | float) or not isinstance(relief, int | float):
            return None
        return float(eta) * max(float(relief), 1.0)

    @property
    def eta_max(self) -> float:
        """The larger eta: that of contributing tokens, if there is one."""
        return self.eta * (self.relief if self._contributing_V.any() else 1.0)

    def etas(self) -> NDArray[np.float64]:
        """Give each token's eta, (V,)."""
        return np.where(self._contributing_V, self.eta * self.relief, self.eta)

    def guarantee(self) -> Guarantee:
        """State d_chi-privacy within a group, and that there is none between groups."""
        count = int(self._contributing_V.sum())
        return Guarantee(
            metric="Euclidean distance of two representations at the cut, tokens of one group",
            adversary="knows everything but the device's secret, the groups included",
            eta=self.eta_max,
            statement=f"{count} of {len(self._contributing_V)} tokens are contributing and get "
            f"eta = {self.eta * self.relief:.6g}, all others eta = {self.eta:.6g}. Among tokens "
            "of one group, one released token is d_chi-private with the group's eta. Between the "
            f"groups the log-ratio gains d ln({self.relief:.6g}) and a term without bound: no pure "
            "d_chi, and the size of the noise may tell which group a token is of. It "
            "composes over the tokens of a sentence and over releases. Above cut 0 a "
            "representation carries its context, so neighbours are sequences rather than words. "
            "The cloud supplies the groups; the device bounds eta, not how they were chosen.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        vocabulary = len(self._contributing_V)
        if hidden_TD.shape[1] != self.dimension:
            raise MechanismError(
                f"{self.name}.dimension = {self.dimension}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= vocabulary):
            raise MechanismError(
                f"{self.name}.vocabulary = {vocabulary}: a token id lies outside it"
            )
        noise_TD = sample_dchi(rng, len(hidden_TD), self.dimension, self.eta)
        noise_TD[self._contributing_V[ids_T]] /= self.relief
        return hidden_TD + noise_TD


def _tables(public: PublicKnowledge, share: float) -> dict[str, NDArray[Any]]:
    """Choose the entries of highest importance; unknown and special ones never contribute."""
    from privtune_flwr.privacy.privtune.importance import importance

    score_V = importance(public.sequences, public.bank)
    score_V[public.special_ids] = np.nan
    known = np.flatnonzero(np.isfinite(score_V))
    # Stable, so that ties fall alike on every machine.
    best = known[np.argsort(-score_V[known], kind="stable")][: round(share * len(known))]
    contributing_V = np.zeros(len(score_V), dtype=np.uint8)
    contributing_V[best] = 1
    return {"contributing": contributing_V}
