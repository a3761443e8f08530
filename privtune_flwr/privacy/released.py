"""Where released rows of each token lie, learned from releases of one's own.

An additive mechanism says it itself: the clean mean plus a known shift. Of any other the cloud, and
so the attacker, passes public text through the mechanism and takes means:

    mu_v = (n_v mean_v + k (A b_v + c)) / (n_v + k)

with A b_v + c a ridge regression of released rows on the bank. So a token that the text lacks, or
nearly, stands where its clean representation would lead one to expect it: at the bank entry itself
where nothing is done to rows, at the common mean where the bank tells nothing.

Shapes: ``T`` tokens of one sentence, ``N`` rows, ``d`` hidden size, ``r`` width of a released row,
``V`` vocabulary, ``U`` tokens that occur.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from privtune_flwr.privacy.base import Mechanism
    from privtune_flwr.privacy.public import PublicKnowledge

_PSEUDO_COUNT = 2.0
_RIDGE = 0.01
_DRAWS = 3  # releases of each public sentence; one where each costs a pass through the model


class ReleasedLaw(NamedTuple):
    """One Gaussian a token.

    Attributes
    ----------
    means_VR : float32 array, shape (V, r)
    covariance_RR : float64 array, shape (r, r)
        Of released rows about their tokens' means, plus a ridge: positive definite.
    """

    means_VR: NDArray[np.float32]
    covariance_RR: NDArray[np.float64]


class _Sums(NamedTuple):
    numbers_V: NDArray[np.float64]
    sums_VR: NDArray[np.float64]
    squares_RR: NDArray[np.float64]


def released_law(
    mechanism: Mechanism,
    public: PublicKnowledge,
    *,
    rows: int = 40_000,
    own: Iterable[tuple[NDArray[Any], NDArray[Any]]] = (),
) -> ReleasedLaw:
    """Estimate means and covariance of a mechanism's releases; public parts are cached.

    Parameters
    ----------
    mechanism : Mechanism
        As the devices run it. The draws here are the fitter's own.
    public : PublicKnowledge
        Bank and rows.
    rows : int
        Public tokens at most.
    own : iterable of (rows (T, r), ids (T,))
        Releases of further text that the fitter owns.
    """
    draws = _DRAWS if mechanism.reads == "rows" else 1
    settings: dict[str, str | int | float] = {
        "spec": mechanism.spec.id,
        "rows": rows,
        "draws": draws,
    }
    kept = public.cached("released", settings, lambda: _public_sums(mechanism, public, rows, draws))
    vocabulary, width = public.vocab_size, kept["squares"].shape[0]
    numbers_V, sums_VR = np.zeros(vocabulary), np.zeros((vocabulary, width))
    numbers_V[kept["ids"]] = kept["numbers"]
    sums_VR[kept["ids"]] = kept["sums"]
    more = _Sums(numbers_V, sums_VR, np.array(kept["squares"]))
    for released_TR, ids_T in own:
        _add(more, np.asarray(released_TR, np.float64), np.asarray(ids_T, np.int64))
    return _law(more, np.asarray(public.bank, np.float64))


def _public_sums(
    mechanism: Mechanism, public: PublicKnowledge, rows: int, draws: int
) -> dict[str, NDArray[Any]]:
    width, clean = mechanism.width(public.hidden_size), public.rows(rows)
    sums = _Sums(
        np.zeros(public.vocab_size), np.zeros((public.vocab_size, width)), np.zeros((width, width))
    )
    ends = np.cumsum(clean.lengths)[:-1]
    sentences = list(zip(np.split(clean.values, ends), np.split(clean.ids, ends), strict=True))
    rng = np.random.default_rng(0)  # a simulation of the devices' noise: not secret
    for _ in range(draws):
        for values_TD, ids_T in sentences:
            released_TR = mechanism.perturb(values_TD, ids_T, rng).astype(np.float64)
            _add(sums, released_TR, ids_T.astype(np.int64))
    present = np.flatnonzero(sums.numbers_V)
    return {
        "ids": present,
        # draws make a mean exacter but no more text
        "numbers": sums.numbers_V[present] / draws,
        "sums": sums.sums_VR[present] / draws,
        "squares": sums.squares_RR / draws,
    }


def _add(sums: _Sums, released_TR: NDArray[np.float64], ids_T: NDArray[np.int64]) -> None:
    np.add.at(sums.numbers_V, ids_T, 1.0)
    np.add.at(sums.sums_VR, ids_T, released_TR)
    np.add(sums.squares_RR, released_TR.T @ released_TR, out=sums.squares_RR)


def _law(sums: _Sums, bank_VD: NDArray[np.float64]) -> ReleasedLaw:
    seen = np.flatnonzero(sums.numbers_V)
    number_U, total = sums.numbers_V[seen], sums.numbers_V.sum()
    mean_UR = sums.sums_VR[seen] / number_U[:, None]
    means_VR = _regressed(bank_VD, seen, number_U, mean_UR)
    share_U1 = (number_U / (number_U + _PSEUDO_COUNT))[:, None]
    means_VR[seen] = share_U1 * mean_UR + (1 - share_U1) * means_VR[seen]
    centre_R = number_U @ mean_UR / total
    # sum of (y - mu)(y - mu)', everything counted from the common mean
    near_UR, about_UR = mean_UR - centre_R, means_VR[seen] - centre_R
    cross_RR = (near_UR * number_U[:, None]).T @ about_UR
    own_RR = (about_UR * number_U[:, None]).T @ about_UR
    square_RR = sums.squares_RR - total * np.outer(centre_R, centre_R)
    covariance_RR = (square_RR - cross_RR - cross_RR.T + own_RR) / total
    spread = float(np.mean(np.diag(square_RR))) / total
    # rows that are all alike have no spread: any Gaussian will do
    ridge = _RIDGE * float(np.mean(np.diag(covariance_RR))) + 1e-6 * max(spread, 0.0) + 1e-9
    return ReleasedLaw(
        means_VR.astype(np.float32), covariance_RR + ridge * np.eye(len(covariance_RR))
    )


def _regressed(
    bank_VD: NDArray[np.float64],
    seen: NDArray[np.int64],
    number_U: NDArray[np.float64],
    mean_UR: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Predict each token's mean released row from its bank entry, (V, r)."""
    weight_U1 = (number_U / number_U.sum())[:, None]
    bank_D, mean_R = (bank_VD[seen] * weight_U1).sum(axis=0), (mean_UR * weight_U1).sum(axis=0)
    entry_UD = bank_VD[seen] - bank_D
    gram_DD = entry_UD.T @ (entry_UD * weight_U1)
    gram_DD += _RIDGE * np.mean(np.diag(gram_DD)) * np.eye(len(gram_DD))
    slope_DR = np.linalg.solve(gram_DD, entry_UD.T @ ((mean_UR - mean_R) * weight_U1))
    predicted_VR: NDArray[np.float64] = (bank_VD - bank_D) @ slope_DR + mean_R
    return predicted_VR
