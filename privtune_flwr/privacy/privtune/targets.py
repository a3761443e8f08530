"""Where each token is shifted to (*reconstruction*): the closed form of the paper's OPT-3.

``t_v`` is the softmin-weighted mean of the nearest members of N_n(v), the temperature being one
unit; the mean of the noise is ``p*_v = alpha (t_v - b_v)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.privtune.graph import hop_sets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

_BLOCK = 1024


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
    points = bank_ND.astype(np.float32, copy=True)
    square_N = np.einsum("nd,nd->n", bank_ND, bank_ND, dtype=np.float64).astype(np.float32)
    for start in range(0, len(bank_ND), _BLOCK):
        stop = min(start + _BLOCK, len(bank_ND))
        gram_BN = bank_ND[start:stop] @ bank_ND.T
        open_B = np.ones(stop - start, dtype=bool)
        for members in reversed(hop_sets(graph, start, stop, hops)):
            row_M = np.repeat(np.arange(stop - start), np.diff(members.indptr))
            square_M = square_N[start + row_M] + square_N[members.indices]
            square_M -= 2 * gram_BN[row_M, members.indices]
            distance_M = np.sqrt(np.maximum(square_M, 0))
            # By row, then distance, then node: ties are broken the same way everywhere.
            order_M = np.lexsort((members.indices, distance_M, row_M))
            for row in np.flatnonzero(open_B & (np.diff(members.indptr) > 0)):
                first = members.indptr[row]
                best = order_M[first : min(first + targets, members.indptr[row + 1])]
                weights = _softmin(distance_M[best], unit)
                points[start + row] = weights @ bank_ND[members.indices[best]]
                open_B[row] = False
            if not open_B.any():
                break
    return points


def _softmin(distance: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    weights = np.exp(-(distance - distance.min()) / temperature)
    share: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return share
