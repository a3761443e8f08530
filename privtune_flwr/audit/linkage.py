"""Linkage: whether two devices' releases of the same sentence can be recognised as such.

Each device draws noise under a secret of its own, so equal text does not give equal bytes. What is
left to match by is what the noise does not hide.

Shapes: ``T`` tokens of one sentence, ``S`` sentences of one length, ``N`` rows, ``d`` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from privtune_flwr.audit.measure import Figure, ratio_figures
from privtune_flwr.privacy.base import Mechanism
from privtune_flwr.privacy.keyed import SECRET_BYTES, example_identity, keyed_generator

if TYPE_CHECKING:
    from privtune_flwr.privacy.public import PublicKnowledge

_FIT_ROWS = 10_000
_EXPECTED_FROM = 4  # releases whose mean stands for what is expected of a row
_RIDGE = 1e-6


@dataclass(frozen=True)
class Linkage:
    """Whether two devices' releases of the same sentences can be matched.

    Attributes
    ----------
    share : Figure
        Sentences of the one device whose likeliest match at the other is the right one.
    by_length : float
        Expected share for an attacker who sees lengths alone.
    chance : float
        1/n.
    """

    share: Figure
    by_length: float
    chance: float


def linkage(
    mechanism: Mechanism,
    clean: Sequence[NDArray[np.float32]],
    ids: Sequence[NDArray[Any]],
    *,
    public: PublicKnowledge,
    seed: int = 0,
) -> Linkage:
    """Release the same sentences by two devices and match them.

    Each sentence of the first is matched to the one of the second that makes "both rows come from
    one clean row" likeliest against "from two", summed over tokens, with Gaussians for clean rows
    and noise whose covariances come from public text (probabilistic linear discriminant analysis:
    Ioffe, ECCV 2006). Candidates have equal length: the right one is always among them, since a
    mechanism keeps lengths.

    Parameters
    ----------
    mechanism : Mechanism
        Of both; their secrets differ.
    clean : sequence of float32 arrays (T, d)
        Clean rows.
    ids : sequence of int arrays (T,)
        Their tokens. Of sentences that occur twice only the first is kept: to link such twins the
        other way round would be no error.
    public : PublicKnowledge
        What the attacker fits itself on.
    seed : int
        Of the secrets and the bootstrap.
    """
    first = {example_identity(i): n for n, i in reversed(list(enumerate(ids)))}
    kept = sorted(first.values())
    rng = np.random.default_rng(seed)
    secrets = [rng.bytes(SECRET_BYTES) for _ in range(2)]
    space = _pair_space(mechanism, public)
    by_length: dict[int, list[int]] = {}
    for index in kept:
        by_length.setdefault(len(ids[index]), []).append(index)
    hits = []
    for same in by_length.values():
        ours_STD, theirs_STD = (
            np.stack([_keyed_release(mechanism, clean[i], ids[i], s) for i in same]) - space.mean_D
            for s in secrets
        )
        ours_STD, theirs_STD = ours_STD @ space.axes_DD, theirs_STD @ space.axes_DD
        # What depends on ours alone is the same for all candidates.
        product_SS = np.einsum("atd,btd->ab", ours_STD * space.product_D, theirs_STD, optimize=True)
        likelihood_SS = product_SS + (theirs_STD**2 @ space.square_D).sum(axis=1)
        hits += (likelihood_SS.argmax(axis=1) == np.arange(len(same))).tolist()
    hit_S1 = np.array(hits, dtype=np.float64)[:, None]
    [share] = ratio_figures(hit_S1, np.ones_like(hit_S1), seed=seed)
    return Linkage(share, len(by_length) / len(kept), 1 / len(kept))


@dataclass(frozen=True)
class _PairSpace:
    """Axes on which noise has variance one and clean rows are uncorrelated; weights of a pair."""

    mean_D: NDArray[np.float64]
    axes_DD: NDArray[np.float64]
    product_D: NDArray[np.float64]
    square_D: NDArray[np.float64]


def _pair_space(mechanism: Mechanism, public: PublicKnowledge) -> _PairSpace:
    from sklearn.covariance import ledoit_wolf

    released_ND, expected_ND = _own_releases(mechanism, public)
    # Shrunk: where the noise is strong, errors of a plain estimate would exceed what is matched.
    noise_DD, _ = ledoit_wolf(released_ND - expected_ND, assume_centered=True)
    signal_DD = np.atleast_2d(np.cov(expected_ND, rowvar=False))
    # Without noise this ridge makes the match the nearest one; rows that are all alike have none.
    noise_DD += (_RIDGE * np.mean(np.diag(signal_DD)) or _RIDGE) * np.eye(len(signal_DD))
    variance_D, axes_DD = eigh(signal_DD, noise_DD)
    v_D = np.maximum(variance_D, 0)
    # log N([a, b]; [[v+1, v], [v, v+1]]) - log N([a, b]; (v+1) I), without constants.
    square_D = -((v_D + 1) / (2 * v_D + 1) - 1 / (v_D + 1)) / 2
    return _PairSpace(expected_ND.mean(axis=0), axes_DD, v_D / (2 * v_D + 1), square_D)


def _own_releases(
    mechanism: Mechanism, public: PublicKnowledge
) -> tuple[NDArray[np.floating[Any]], NDArray[np.float64]]:
    """Release public text, (N, d), and give what was to be expected of each row, (N, d)."""
    clean = public.rows(_FIT_ROWS)
    ends = np.cumsum(clean.lengths)[:-1]
    sentences = list(zip(np.split(clean.values, ends), np.split(clean.ids, ends), strict=True))
    rng = np.random.default_rng(0)  # the attacker's own simulation: not secret
    released_ND = np.concatenate([mechanism.perturb(v, i, rng) for v, i in sentences])
    if mechanism.additive:
        shift_VD = mechanism.shift()
        expected_ND = np.array(clean.values, dtype=np.float64)
        if shift_VD is not None:
            expected_ND += shift_VD[clean.ids]
        return released_ND, expected_ND
    total_ND = np.zeros(released_ND.shape)
    for _ in range(_EXPECTED_FROM):
        total_ND += np.concatenate([mechanism.perturb(v, i, rng) for v, i in sentences])
    return released_ND, total_ND / _EXPECTED_FROM


def _keyed_release(
    mechanism: Mechanism, clean_TD: NDArray[np.float32], ids_T: NDArray[Any], secret: bytes
) -> NDArray[np.float64]:
    rng = keyed_generator(secret, mechanism.spec.id, example_identity(ids_T))
    return mechanism.perturb(clean_TD, ids_T, rng).astype(np.float64)
