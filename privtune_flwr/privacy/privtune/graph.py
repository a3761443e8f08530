"""Neighbours in the bank and exact n-hop sets (*reconstruction* of "indirect neighbours").

The paper's text is not known; we read "n-hop indirect neighbours" as the nodes at shortest-path
distance exactly n in the symmetrised k-nearest-neighbour graph of the bank. n = 1 is what a
nearest-neighbour attacker lists anyway, a large n destroys meaning; the default is 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array


_TARGETS_AT_ONCE = 2048  # a multiple of 64


def nearest(bank_ND: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find each row's k nearest other rows by Euclidean distance.

    Parameters
    ----------
    bank_ND : float32 array, shape (N, d)
        Rows; more than k of them.
    k : int
        Neighbours a row.

    Returns
    -------
    distances, indices : arrays of shape (N, k)
        Nearest first; a row is never its own neighbour, also where rows coincide.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean").fit(bank_ND)
    distances, indices = index.kneighbors()  # without an argument the row itself is left out
    return distances.astype(np.float32), indices.astype(np.int64)


def symmetric_graph(indices_NK: NDArray[np.int64]) -> csr_array:
    """Join v and w if either lists the other.

    Returns
    -------
    scipy.sparse.csr_array of bool, shape (N, N)
        Adjacency without a diagonal.
    """
    from scipy.sparse import csr_array

    n, k = indices_NK.shape
    rows = np.repeat(np.arange(n), k)
    listed = csr_array((np.ones(n * k, dtype=bool), (rows, indices_NK.ravel())), shape=(n, n))
    return csr_array(listed + listed.T)


def hop_sets(graph: csr_array, start: int, stop: int, hops: int) -> list[csr_array]:
    """Find the nodes at distance exactly 1, 2, ... ``hops`` from each of a block of nodes.

    Powers of the boolean adjacency, each less all that was reached before. A block of rows at a
    time, since the sets of all nodes together grow towards N x N with the number of hops.

    Parameters
    ----------
    graph : csr_array of bool, shape (N, N)
        Symmetric adjacency without a diagonal.
    start, stop : int
        The block of B nodes.
    hops : int
        n, at least 1.

    Returns
    -------
    list of csr_array of bool, shape (B, N)
        Item i holds distance i + 1; sorted indices.
    """
    from scipy.sparse import csr_array

    size = stop - start
    itself = csr_array(
        (np.ones(size, dtype=bool), (np.arange(size), np.arange(start, stop))),
        shape=(size, graph.shape[0]),
    )
    reached, frontier = itself, itself
    sets = []
    for _ in range(hops):
        step = csr_array(frontier @ graph)
        step.data[:] = True
        frontier = csr_array(step > step.multiply(reached))
        frontier.eliminate_zeros()
        frontier.sort_indices()
        reached = csr_array(reached + frontier)
        sets.append(frontier)
    return sets


def hop_sizes(graph: csr_array, hops: int) -> NDArray[np.int64]:
    """Count the members of every exact hop set.

    Reach is kept as bits, for a block of target nodes at a time: one step is an OR over each
    node's neighbours, so that even sets which grow towards N x N are counted in seconds.

    Parameters
    ----------
    graph : csr_array of bool, shape (N, N)
        Symmetric adjacency without a diagonal; each node has a neighbour.
    hops : int
        n.

    Returns
    -------
    int64 array, shape (n, N)
        Sizes of N_1 to N_n.
    """
    nodes = graph.shape[0]
    sizes = np.zeros((hops, nodes), dtype=np.int64)
    if not (np.diff(graph.indptr) > 0).all():
        raise ValueError("a node has no neighbour")
    for start in range(0, nodes, _TARGETS_AT_ONCE):
        stop = min(start + _TARGETS_AT_ONCE, nodes)
        own = np.zeros((nodes, _TARGETS_AT_ONCE), dtype=bool)
        own[np.arange(start, stop), np.arange(stop - start)] = True
        reached = np.packbits(own, axis=1).view(np.uint64)
        before = np.bitwise_count(reached).sum(axis=1, dtype=np.int64)
        for hop in range(hops):
            reached = reached | np.bitwise_or.reduceat(
                reached[graph.indices], graph.indptr[:-1], axis=0
            )
            after = np.bitwise_count(reached).sum(axis=1, dtype=np.int64)
            sizes[hop] += after - before
            before = after
    return sizes
