"""What PrivTune promises, in words: exact about its scales and about its shift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import Guarantee

_LISTED = 12  # buckets that are listed one by one


def privtune_guarantee(
    eta: float, scale_V: NDArray[np.float32], *, vector: str, per: str, importance: str
) -> Guarantee:
    """State what the shifted, scaled noise promises, and what it does not.

    Parameters
    ----------
    eta : float
        At scale 1.
    scale_V : float32 array, shape (V,)
        ``s_v``.
    vector, per, importance : str
        How p* was found, for what, and where the scales come from.
    """
    eta_max = eta / float(scale_V.min())
    shifted = "g(v) = phi(v) + p*_v" if per == "entry" else "g(h) = h + p*(h)"
    solved = (
        ""
        if per == "entry"
        else (
            "p* is solved on the device for each row, from public tables and the clean row alone, "
            "so it is a deterministic part of g. "
        )
    )
    made = "the closed form" if vector == "closed" else "projected gradient descent"
    return Guarantee(
        metric=f"Euclidean distance of two shifted representations {shifted}",
        adversary="knows everything but the device's secret, the shift p* included",
        eta=eta_max,
        statement=f"Among tokens of one noise scale s, one released token is d_chi-private "
        f"with eta = {eta:.6g} / s (at most {eta_max:.6g}) in the shifted metric, "
        "not in the distance of clean representations; pulling tokens towards shared targets "
        f"shrinks that metric, and that is the gain. {_scales(eta, scale_V)} {_source(importance)}"
        f"It composes over tokens and releases. {solved}Above cut 0 a representation carries its "
        "context, so neighbours are sequences. p* is public: against an adversary who knows it "
        "the shift alone protects nothing, only the random part and tokens sharing a target do. "
        f"The cloud supplies p* ({made}); the device checks its shape and the scale, not how it "
        "was made.",
    )


def _scales(eta: float, scale_V: NDArray[np.float32]) -> str:
    scales, entries = np.unique(scale_V, return_counts=True)
    if len(scales) == 1:
        return (
            f"The vocabulary has one scale, s = {scales[0]:.6g}, so this holds between any two of "
            f"its {len(scale_V)} entries."
        )
    between = (
        "Between tokens of different scales the log-ratio gains d ln(eta_v / eta_w) and a term "
        "without bound: no pure d_chi."
    )
    if len(scales) > _LISTED:
        return (
            f"The vocabulary has {len(scales)} different scales; the largest group with one scale "
            f"has {entries.max()} of {len(scale_V)} entries. {between}"
        )
    listed = "; ".join(
        f"eta = {eta / float(s):.6g} (s = {float(s):.4g}, {n} entries)"
        for s, n in zip(scales, entries, strict=True)
    )
    return f"The vocabulary has {len(scales)} scale buckets: {listed}. {between}"


def _source(importance: str) -> str:
    if importance == "none":
        return ""
    return (
        "The scales come from public text alone; the scale of a token follows from which token it "
        "is, so they tell nothing that the token would not. "
    )
