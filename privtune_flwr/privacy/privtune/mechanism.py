"""The mechanism ``privtune`` (*reconstruction*): release h + p*_v + s_v r u.

Known from the paper's abstract and secondary accounts: noise moves each token towards its n-hop
indirect neighbours, a crafted vector is the mean of the d_chi noise, and the draw is scaled by
token importance. The exact programs are not known; here the mean is the closed form of
:mod:`~privtune_flwr.privacy.privtune.targets`, the scale that of
:mod:`~privtune_flwr.privacy.privtune.importance`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
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
_NAMES = ("eta", "unit", "dimension", "vocabulary", "hops", "neighbours", "targets", "shift")


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

        eta, unit = resolve_eta(config, public)
        recipe: dict[str, str | int | float] = {
            "hops": config.hops,
            "neighbours": config.neighbours,
            "targets": config.targets,
            "shift": config.shift,
            "importance_floor": config.importance_floor,
        }
        tables = public.cached("privtune", recipe, lambda: _tables(config, public))
        # Plain copies: cached tables are memory-mapped.
        save_file({name: np.array(table) for name, table in tables.items()}, folder / TENSORS)
        vocabulary, dimension = tables["shift"].shape
        params: dict[str, str | int | float] = {
            **recipe,
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
        reader = ParamReader(spec, (*_NAMES, "importance_floor"))
        eta = reader.real("eta", *ETA_RANGE)
        reader.real("unit", *UNIT_RANGE)
        reader.integer("hops", 1, 4)
        reader.integer("neighbours", 2, 100)
        reader.integer("targets", 1, 100)
        reader.real("shift", 0, 4)
        floor = reader.real("importance_floor", 1e-6, 1)
        shape = (
            reader.integer("vocabulary", *_VOCABULARY_RANGE),
            reader.integer("dimension", *DIMENSION_RANGE),
        )
        shift_VD, scale_V = _read_tables(artefact, shape)
        if not np.isfinite(scale_V).all() or scale_V.min() < floor or scale_V.max() > 1:
            raise MechanismError(
                f"{cls.name}: a scale of the artefact lies outside importance_floor = {floor:g} "
                "to 1"
            )
        return cls(spec, eta=eta, shift_VD=shift_VD, scale_V=scale_V)

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
        return Guarantee(
            metric="Euclidean distance of two shifted representations g(v) = phi(v) + p*_v",
            adversary="knows everything but the device's secret, the shift p* included",
            eta=self.eta_max,
            statement=f"Among tokens of one noise scale s, one released token is d_chi-private "
            f"with eta = {self.eta:.6g} / s (at most {self.eta_max:.6g}) in the shifted metric, "
            "not in the distance of clean representations; pulling tokens towards shared targets "
            "shrinks that metric, and that is the gain. Between tokens of different scales the "
            "log-ratio gains d ln(eta_v / eta_w) and a term without bound: no pure d_chi. It "
            "composes over tokens and releases. Above cut 0 a representation carries its context, "
            "so neighbours are sequences. p* is public: against an adversary who knows it the "
            "shift alone protects nothing, only the random part and tokens sharing a target do. "
            "The cloud supplies p*; the device checks its shape and the scale, not how it was "
            "made.",
        )

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
        scale_T1 = self._scale_V[ids_T].astype(np.float64)[:, None]
        return hidden_TD + self._shift_VD[ids_T].astype(np.float64) + scale_T1 * noise_TD


def _tables(config: PrivacyConfig, public: PublicKnowledge) -> dict[str, NDArray[np.generic]]:
    from privtune_flwr.privacy.privtune.graph import symmetric_graph
    from privtune_flwr.privacy.privtune.importance import importance, noise_scale
    from privtune_flwr.privacy.privtune.targets import target_points

    bank_VD = public.bank
    text = public.text_ids  # special tokens are no nodes: nothing should come to resemble them
    _, indices = public.nearest(config.neighbours)
    bank_ND = np.ascontiguousarray(bank_VD[text])
    points_ND = target_points(
        bank_ND,
        symmetric_graph(indices),
        hops=config.hops,
        targets=config.targets,
        unit=public.unit,
    )
    shift_VD = np.zeros(bank_VD.shape, dtype=np.float16)
    shift_VD[text] = config.shift * (points_ND - bank_ND)
    if not np.isfinite(shift_VD).all():
        raise MechanismError(f"{PrivTune.name}: a shift does not fit float16")
    special = np.setdiff1d(np.arange(len(bank_VD)), text)
    scores_V = importance(public.sequences, bank_VD)
    scale_V = noise_scale(scores_V, special, floor=config.importance_floor)
    return {"shift": shift_VD, "scale": scale_V}


def _read_tables(
    artefact: Path | None, shape: tuple[int, int]
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if artefact is None or not (artefact / TENSORS).is_file():
        raise MechanismError(f"{PrivTune.name}: needs its artefact, a folder with {TENSORS}")
    try:
        tables = load_file(artefact / TENSORS)
    except (SafetensorError, OSError, ValueError) as error:
        raise MechanismError(f"{PrivTune.name}: unreadable {TENSORS}: {error}") from None
    for name, kind, wanted in (("shift", np.float16, shape), ("scale", np.float32, shape[:1])):
        table = tables.get(name)
        if table is None or table.dtype != kind or table.shape != wanted:
            raise MechanismError(
                f"{PrivTune.name}: artefact tensor {name!r} must be {np.dtype(kind)} {wanted}"
            )
    return tables["shift"], tables["scale"]
