"""Where each token is shifted to (*reconstruction*): the closed form of the paper's OPT-3.

``t_v`` is the softmin-weighted mean of the nearest members of N_n(v), the temperature being one
unit; the mean of the noise is ``p*_v = alpha (t_v - b_v)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.privtune.graph import hop_sets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_BLOCK = 512


class Members(NamedTuple):
    """The nearest members of one hop set of every node.

    Attributes
    ----------
    ids : int64 array, shape (N, Q)
        Nodes, nearest first; -1 where the set has fewer.
    distances : float32 array, shape (N, Q)
        Their distances; infinite where there is none.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.float32]


def hop_members(
    bank_ND: NDArray[np.float32], graph: csr_array, *, hops: int, count: int
) -> list[Members]:
    """Find the nearest members of the exact hop sets of all nodes.

    Parameters
    ----------
    bank_ND : float32 array, shape (N, d)
        ``b_v``.
    graph : csr_array of bool, shape (N, N)
        From :func:`privtune_flwr.privacy.privtune.graph.symmetric_graph`.
    hops, count : int
        n and Q.

    Returns
    -------
    list of Members
        For N_1 to N_n.
    """
    nodes = len(bank_ND)
    found = [
        Members(np.full((nodes, count), -1), np.full((nodes, count), np.inf, np.float32))
        for _ in range(hops)
    ]
    square_N = np.einsum("nd,nd->n", bank_ND, bank_ND, dtype=np.float64).astype(np.float32)
    for start in range(0, nodes, _BLOCK):
        stop = min(start + _BLOCK, nodes)
        gram_BN = bank_ND[start:stop] @ bank_ND.T
        for into, members in zip(found, hop_sets(graph, start, stop, hops), strict=True):
            row_M = np.repeat(np.arange(stop - start), np.diff(members.indptr))
            square_M = square_N[start + row_M] + square_N[members.indices]
            square_M -= 2 * gram_BN[row_M, members.indices]
            for row in np.flatnonzero(np.diff(members.indptr)):
                first, last = members.indptr[row], members.indptr[row + 1]
                best = _smallest(square_M[first:last], count)
                into.ids[start + row, : len(best)] = members.indices[first:last][best]
                distances = np.sqrt(np.maximum(square_M[first:last][best], 0))
                into.distances[start + row, : len(best)] = distances
    return found


def _smallest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Places of the smallest values, in order; ties go to the earlier place, that is lower id."""
    if len(values) > count:
        bound = np.partition(values, count - 1)[count - 1]
        kept = np.flatnonzero(values <= bound)
    else:
        kept = np.arange(len(values))
    return kept[np.argsort(values[kept], kind="stable")][:count]


def farthest_set(found: list[Members]) -> Members:
    """Give N_n, or for nodes where it is empty the farthest hop set that is not."""
    ids, distances = found[-1].ids.copy(), found[-1].distances.copy()
    for nearer in reversed(found[:-1]):
        empty = ids[:, 0] < 0
        ids[empty], distances[empty] = nearer.ids[empty], nearer.distances[empty]
    return Members(ids, distances)


def target_points(
    bank_ND: NDArray[np.float32], graph: csr_array, *, hops: int, targets: int, unit: float
) -> NDArray[np.float32]:
    """Compute the target of each row of the bank.

    Where N_n(v) is empty (a small component of the graph), the farthest hop set that is not is
    taken instead; a row without any neighbour is its own target.

    Parameters
    ----------
    bank_ND : float32 array, shape (N, d)
        ``b_v``.
    graph : csr_array of bool, shape (N, N)
        From :func:`privtune_flwr.privacy.privtune.graph.symmetric_graph`.
    hops, targets : int
        n, and how many of the nearest members of N_n(v) are mixed.
    unit : float
        Temperature of the softmin, a distance.

    Returns
    -------
    float32 array, shape (N, d)
        ``t_v``.
    """
    members = farthest_set(hop_members(bank_ND, graph, hops=hops, count=targets))
    return mixed_points(bank_ND, members, targets=targets, unit=unit)


def mixed_points(
    bank_ND: NDArray[np.float32], members: Members, *, targets: int, unit: float
) -> NDArray[np.float32]:
    """Mix the ``targets`` nearest members of each node; its own point where it has none."""
    ids_NQ, distances_NQ = members.ids[:, :targets], members.distances[:, :targets]
    points = np.array(bank_ND, dtype=np.float32)
    known = ids_NQ[:, 0] >= 0
    nearest_N1 = distances_NQ[known, :1]
    weights_NQ = np.exp(-(distances_NQ[known] - nearest_N1) / unit)  # zero where there is none
    weights_NQ /= weights_NQ.sum(axis=1, keepdims=True)
    points[known] = sum(  # one member at a time: (N, Q, d) would be large
        weights_NQ[:, [q]] * bank_ND[ids_NQ[known, q]] for q in range(ids_NQ.shape[1])
    )
    return points
