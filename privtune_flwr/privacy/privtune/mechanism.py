"""The mechanism ``privtune`` (*reconstruction*): release h + p*_v + s_v r u.

Known from the paper's abstract and secondary accounts: noise moves each token towards its n-hop
indirect neighbours, a crafted vector is the mean of the d_chi noise, and the draw is scaled by
token importance. The exact programs are not known; here the mean is the closed form of
:mod:`~privtune_flwr.privacy.privtune.targets` or the solution of
:mod:`~privtune_flwr.privacy.privtune.optimise`, the scale that of
:mod:`~privtune_flwr.privacy.privtune.importance`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
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

TENSORS = "privtune.safetensors"
DESCRIPTION = "privtune.json"
_VOCABULARY_RANGE = (2, 10_000_000)
_NAMES = (
    "eta",
    "unit",
    "dimension",
    "vocabulary",
    "hops",
    "neighbours",
    "targets",
    "shift",
    "importance_floor",
    "vector",
    "per",
    "importance",
    "buckets",
    "protect",
)
_CHOICES = {
    "vector": ("closed", "pgd"),
    "per": ("entry", "occurrence"),
    "importance": ("tfidf-entropy", "tfidf", "entropy", "none"),
}
#: Parameters of the descent and their bounds; present where vector is pgd.
_PROGRAM = {
    "temperature": (1e-6, 10.0),
    "repel": (0.0, 100.0),
    "far": (0.0, 100.0),
    "spread": (0.0, 100.0),
    "consistency": (0.0, 100.0),
    "semantic": (0.0, 1.0),
    "validity": (0.0, 1.0),
    "radius": (0.0, 100.0),
}


class PrivTune(Mechanism):
    """Shift each token towards its indirect neighbours, then add scaled d_chi noise.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    eta : float
        Inverse length at scale 1.
    shift_VD : float array, shape (V, d)
        ``p*_v``; zero for special tokens, which carry no text.
    scale_V : float32 array, shape (V,)
        ``s_v``.
    """

    name: ClassVar[str] = "privtune"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        eta: float,
        shift_VD: NDArray[np.float16],
        scale_V: NDArray[np.float32],
    ) -> None:
        super().__init__(spec)
        self.eta = eta
        self._shift_VD = shift_VD
        self._scale_V = scale_V

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Compute shift and scale of the whole vocabulary and write them as the artefact.

        The result is cached with the public knowledge, so that a resumed run designs the very
        same mechanism and its devices need not release anew.
        """
        from safetensors.numpy import save_file

        from privtune_flwr.privacy.privtune.tables import (
            occurrence_tables,
            program_params,
            scale_table,
            shift_table,
        )

        eta, unit = resolve_eta(config, public)
        settings = config.privtune
        tables: dict[str, NDArray[Any]] = {
            "shift": shift_table(config, public),
            "scale": scale_table(config, public),
        }
        if settings.per == "occurrence":
            tables |= occurrence_tables(config, public)
        # Plain copies: cached tables are memory-mapped.
        save_file({name: np.array(table) for name, table in tables.items()}, folder / TENSORS)
        vocabulary, dimension = tables["shift"].shape
        params: dict[str, Param] = {
            "hops": config.hops,
            "neighbours": config.neighbours,
            "targets": config.targets,
            "shift": config.shift,
            "importance_floor": config.importance_floor,
            "vector": settings.vector,
            "per": settings.per,
            "importance": settings.importance,
            "buckets": settings.buckets,
            "protect": settings.protect,
            **(program_params(config) if settings.vector == "pgd" else {}),
            "eta": eta,
            "unit": unit,
            "dimension": dimension,
            "vocabulary": vocabulary,
        }
        content = json.dumps(params, sort_keys=True, allow_nan=False)
        (folder / DESCRIPTION).write_text(content, encoding="utf-8")
        return MechanismSpec(cls.name, params, Manifest.of(folder).id)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from what the cloud sent.

        The scale is what bounds eta, so every entry is checked against ``importance_floor``.
        """
        pgd = spec.params.get("vector") == "pgd"
        reader = ParamReader(spec, (*_NAMES, *((*_PROGRAM, "steps") if pgd else ())))
        for name, allowed in _CHOICES.items():
            if spec.params[name] not in allowed:
                raise MechanismError(f"{cls.name}.{name}: allowed: {', '.join(allowed)}")
        if not isinstance(spec.params["protect"], str) or len(spec.params["protect"]) > 1000:
            raise MechanismError(f"{cls.name}.protect: must be a string of at most 1000 characters")
        eta = reader.real("eta", *ETA_RANGE)
        unit = reader.real("unit", *UNIT_RANGE)
        hops = reader.integer("hops", 1, 4)
        reader.integer("neighbours", 2, 100)
        reader.integer("targets", 1, 100)
        reader.real("shift", 0, 4)
        floor = reader.real("importance_floor", 1e-6, 1)
        buckets = reader.integer("buckets", 0, 1000)
        shape = (
            reader.integer("vocabulary", *_VOCABULARY_RANGE),
            reader.integer("dimension", *DIMENSION_RANGE),
        )
        tables = _read_tables(artefact, shape)
        scale_V = tables["scale"]
        if not np.isfinite(scale_V).all() or scale_V.min() < floor or scale_V.max() > 1:
            raise MechanismError(
                f"{cls.name}: a scale of the artefact lies outside importance_floor = {floor:g} "
                "to 1"
            )
        if buckets and len(np.unique(scale_V)) > buckets:
            raise MechanismError(f"{cls.name}.buckets = {buckets}: the artefact has more scales")
        common: dict[str, Any] = {"eta": eta, "shift_VD": tables["shift"], "scale_V": scale_V}
        if spec.params["per"] == "entry":
            if pgd:
                _read_program(reader)
            return cls(spec, **common)
        if not pgd:
            raise MechanismError(f"{cls.name}.per: occurrence needs vector = pgd")
        from privtune_flwr.privacy.privtune.occurrence import PerOccurrence, check_tables
        from privtune_flwr.privacy.privtune.optimise import Program

        check_tables(tables, shape, hops)
        program = Program(**_read_program(reader))
        made = PerOccurrence(spec, **common, program=program, tables=tables, unit=unit)
        return cast("Self", made)  # the registry knows one class; this one is a kind of it

    @classmethod
    def declared_eta(cls, spec: MechanismSpec) -> float | None:
        """Bound eta / min s by eta / importance_floor: no scale of a valid artefact is smaller."""
        eta, floor = spec.params.get("eta"), spec.params.get("importance_floor")
        if not isinstance(eta, int | float) or not isinstance(floor, int | float) or floor <= 0:
            return None
        return float(eta) / float(floor)

    @property
    def eta_max(self) -> float:
        """Effective eta of the token with the least noise: eta / min s."""
        return self.eta / float(self._scale_V.min())

    def shift(self) -> NDArray[np.float16]:
        """Give ``p*_v``, (V, d)."""
        return self._shift_VD

    def guarantee(self) -> Guarantee:
        """State what the shifted, scaled noise promises, and what it does not."""
        from privtune_flwr.privacy.privtune.statement import privtune_guarantee

        said = {name: str(self.spec.params[name]) for name in _CHOICES}
        return privtune_guarantee(self.eta, self._scale_V, **said)

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        vocabulary, dimension = self._shift_VD.shape
        if hidden_TD.shape[1] != dimension:
            raise MechanismError(
                f"{self.name}.dimension = {dimension}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= vocabulary):
            raise MechanismError(
                f"{self.name}.vocabulary = {vocabulary}: a token id lies outside it"
            )
        noise_TD = sample_dchi(rng, len(hidden_TD), dimension, self.eta)
        noise_TD *= self._scale_V[ids_T].astype(np.float64)[:, None]
        noise_TD += hidden_TD
        noise_TD += self._mean(hidden_TD, ids_T)
        return noise_TD

    def _mean(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64]
    ) -> NDArray[np.floating[Any]]:
        """Give p* of each row, (T, d)."""
        return self._shift_VD[ids_T]


def _read_program(reader: ParamReader) -> dict[str, Any]:
    values: dict[str, Any] = {name: reader.real(name, *bounds) for name, bounds in _PROGRAM.items()}
    return {**values, "steps": reader.integer("steps", 1, 200)}


def _read_tables(artefact: Path | None, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if artefact is None or not (artefact / TENSORS).is_file():
        raise MechanismError(f"{PrivTune.name}: needs its artefact, a folder with {TENSORS}")
    try:
        tables: dict[str, NDArray[Any]] = load_file(artefact / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise MechanismError(f"{PrivTune.name}: unreadable {TENSORS}: {error}") from None
    for name, kind, wanted in (("shift", np.float16, shape), ("scale", np.float32, shape[:1])):
        table = tables.get(name)
        if table is None or table.dtype != kind or table.shape != wanted:
            raise MechanismError(
                f"{PrivTune.name}: artefact tensor {name!r} must be {np.dtype(kind)} {wanted}"
            )
    return tables
