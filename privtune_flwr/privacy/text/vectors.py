"""The vectors that distances between tokens are measured in: the model's input embeddings.

Published text mechanisms work on words and on GloVe or a language model's word table. Here they
work on the entries of the model's own vocabulary (wordpieces), so that the released sentence is one
that the bottom model could have been given.

Shapes: ``N`` tokens, ``d`` width of a vector, ``V`` vocabulary, ``S`` special entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import MechanismError
from privtune_flwr.privacy.privtune.bank import context_free

if TYPE_CHECKING:
    from privtune_flwr.privacy.public import PublicKnowledge


class Vectors:
    """A vector for each vocabulary entry, and which entries are text.

    Parameters
    ----------
    table_VD : float16 array, shape (V, d)
        The law is defined by these values, not by the float32 ones that they were rounded from.
    special_S : int64 array, shape (S,)
        Entries that are no text.
    """

    def __init__(self, table_VD: NDArray[np.float16], special_S: NDArray[np.int64]) -> None:
        self.table_VD = table_VD
        self.text_V = np.ones(len(table_VD), dtype=np.bool_)
        self.text_V[special_S] = False
        self._wide: dict[type[np.floating[Any]], tuple[NDArray[Any], NDArray[Any]]] = {}

    def __len__(self) -> int:
        return len(self.table_VD)

    @property
    def dimension(self) -> int:
        """Width d of a vector."""
        return int(self.table_VD.shape[1])

    def wide(
        self, kind: type[np.floating[Any]] = np.float64
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
        """Give the table (V, d) and its squared norms (V,) in a wider type; kept."""
        if kind not in self._wide:
            table_VD = self.table_VD.astype(kind)
            self._wide[kind] = table_VD, np.einsum("vd,vd->v", table_VD, table_VD)
        return self._wide[kind]

    def distances(
        self, ids_N: NDArray[np.int64], kind: type[np.floating[Any]] = np.float64
    ) -> NDArray[np.floating[Any]]:
        """Measure Euclidean distances from some entries to all, (N, V)."""
        table_VD, squares_V = self.wide(kind)
        distance_NV = table_VD[ids_N] @ table_VD.T
        distance_NV *= -2
        distance_NV += squares_V
        distance_NV += squares_V[ids_N, None]
        np.maximum(distance_NV, 0, out=distance_NV)
        np.sqrt(distance_NV, out=distance_NV)
        distance_NV[np.arange(len(ids_N)), ids_N] = 0  # rounding would leave a little
        return distance_NV


def public_vectors(public: PublicKnowledge) -> tuple[Vectors, float]:
    """Take the bottom model's embedding table, and measure its unit.

    A bottom model that shows no table is asked for each entry without context instead.

    Returns
    -------
    tuple of Vectors and float
        The unit is the median distance of a text entry to its nearest neighbour.

    Raises
    ------
    MechanismError
        If a vector does not fit float16, or the unit is zero.
    """
    bottom = public._bottom
    table_VD = getattr(bottom, "embedding_table", None)
    if table_VD is None:
        table_VD = context_free(bottom, public.tokenizer, np.arange(public.vocab_size))
    with np.errstate(over="ignore"):
        half_VD = np.asarray(table_VD).astype(np.float16)
    if not np.isfinite(half_VD).all():
        raise MechanismError("text: an input embedding does not fit float16")
    vectors = Vectors(half_VD, public.special_ids)
    unit = float(public.cached("text-unit", {}, lambda: {"unit": _unit(vectors)})["unit"][0])
    if not (np.isfinite(unit) and unit > 0):
        raise MechanismError(f"the embedding table's unit is {unit}: entries coincide")
    return vectors, unit


def _unit(vectors: Vectors) -> NDArray[np.float64]:
    from privtune_flwr.privacy.privtune.graph import nearest

    rows_ND = vectors.table_VD[vectors.text_V].astype(np.float32)
    return np.array([np.median(nearest(rows_ND, 1)[0])], dtype=np.float64)
