"""``privtune`` with p* solved on the device for each row it releases (*reconstruction*).

The bank's entry stands for a token in no particular context; here the program is solved for the
row itself. What it is solved over is public and comes with the artefact, so a retry on the same
device solves the same and sends the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.privtune.mechanism import PrivTune

if TYPE_CHECKING:
    from privtune_flwr.privacy.privtune.optimise import Program

_MOST_SAMPLED, _MOST_TOPICS = 4096, 1000


class PerOccurrence(PrivTune):
    """PrivTune whose shift depends on the row, not on its token alone.

    :meth:`shift` gives each entry's, solved at its bank entry: about the mean of what its
    occurrences get, hence not :attr:`additive`.

    Parameters
    ----------
    spec, eta, shift_VD, scale_V
        As in :class:`PrivTune`.
    program : Program
        Weights and bounds.
    tables : mapping of arrays
        See :class:`~privtune_flwr.privacy.privtune.geometry.Geometry`.
    unit : float
        Its unit.
    """

    additive: ClassVar[bool] = False

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        eta: float,
        shift_VD: NDArray[np.float16],
        scale_V: NDArray[np.float32],
        program: Program,
        tables: Mapping[str, NDArray[Any]],
        unit: float,
    ) -> None:
        from privtune_flwr.privacy.privtune.geometry import Geometry

        super().__init__(spec, eta=eta, shift_VD=shift_VD, scale_V=scale_V)
        self._program = program
        self._geometry = Geometry(tables, unit)
        self._node_V = np.asarray(tables["support"][:, 0]) >= 0  # special tokens are none

    def _mean(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64]
    ) -> NDArray[np.floating[Any]]:
        import torch

        from privtune_flwr.privacy.privtune.tables import solve

        mean_TD = np.zeros(hidden_TD.shape, dtype=np.float32)
        nodes = np.flatnonzero(self._node_V[ids_T])
        if len(nodes):
            clean = torch.from_numpy(hidden_TD[nodes].astype(np.float32))
            start = torch.from_numpy(self._shift_VD[ids_T[nodes]].astype(np.float32))
            mean_TD[nodes] = solve(self._program, self._geometry, clean, ids_T[nodes], start)
        return mean_TD


def check_tables(tables: Mapping[str, NDArray[Any]], shape: tuple[int, int], hops: int) -> None:
    """Check what came with an artefact before anything is computed from it.

    Raises
    ------
    MechanismError
        Naming the tensor.
    """
    from privtune_flwr.privacy.privtune.geometry import TABLES, support_places

    vocabulary, dimension = shape
    for name, kind in TABLES.items():
        table = tables.get(name)
        if table is None or table.dtype != kind:
            raise MechanismError(f"privtune: artefact tensor {name!r} must be {np.dtype(kind)}")
        if np.issubdtype(kind, np.floating) and not np.isfinite(table).all():
            raise MechanismError(f"privtune: artefact tensor {name!r} is not finite")
    sampled, topics = tables["sample"].size, tables["probe"].size // (dimension + 1)
    wanted = {
        "bank": shape,
        "support": (vocabulary, support_places(hops)),
        "sample": (min(max(1, sampled), _MOST_SAMPLED),),
        "probe": (dimension + 1, min(max(1, topics), _MOST_TOPICS)),
        "centre": (dimension,),
        "whiten": (dimension, dimension),
        "limit": (1,),
    }
    for name, expected in wanted.items():
        if tables[name].shape != expected:
            raise MechanismError(f"privtune: artefact tensor {name!r} must have shape {expected}")
    for name, least in (("support", -1), ("sample", 0)):
        if tables[name].min() < least or tables[name].max() >= vocabulary:
            raise MechanismError(f"privtune: artefact tensor {name!r} names an unknown entry")
    if tables["limit"][0] <= 0:
        raise MechanismError("privtune: artefact tensor 'limit' must be positive")
