"""Checks of a sampler against the law it claims; each raises AssertionError on a wrong one.

All p-values are held against :data:`REJECT`, far below what a right sampler gives at the fixed
seeds of the tests, and far above what the usual wrong ones give with a few thousand tokens.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

REJECT = 1e-4
Values = NDArray[np.floating[Any]]


def norms_of(noise_TD: Values) -> NDArray[np.float64]:
    """Length of each row in double precision."""
    return np.linalg.norm(noise_TD.astype(np.float64), axis=1)


def directions_of(noise_TD: Values) -> NDArray[np.float64]:
    """Each row with length one."""
    return noise_TD.astype(np.float64) / norms_of(noise_TD)[:, None]


def follows(sample: Values, law: Any) -> bool:
    """Kolmogorov-Smirnov."""
    return float(stats.kstest(sample, law.cdf).pvalue) > REJECT


def check_gamma_radius(norms_T: Values, d: int, eta: float) -> None:
    """Norms follow Gamma(shape d, scale 1 / eta)."""
    assert follows(norms_T, stats.gamma(d, scale=1 / eta)), "the radius is not Gamma(d, 1/eta)"


def check_chi_radius(norms_T: Values, d: int, sigma: float) -> None:
    """Norms of N(0, sigma^2 I) follow a scaled chi law."""
    assert follows(norms_T, stats.chi(d, scale=sigma)), "the radius is not sigma chi(d)"


def check_ball_radius(norms_T: Values, d: int, radius_T: Values) -> None:
    """Of vectors uniform in balls, (norm / radius)^d is uniform on [0, 1]."""
    assert (norms_T <= radius_T * (1 + 1e-5)).all(), "a vector left its ball"
    share_T = np.minimum(norms_T / radius_T, 1.0) ** d
    assert follows(share_T, stats.uniform), "the radius is not that of a uniform vector in a ball"


def check_uniform_directions(directions_TD: Values) -> None:
    """Unit vectors are uniform on the sphere.

    The projection x on any fixed axis has (x + 1) / 2 ~ Beta(a, a) with a = (d - 1) / 2. Axes:
    coordinates, the diagonal and random ones; Bonferroni-corrected.
    """
    d = directions_TD.shape[1]
    axes = [np.eye(d)[i] for i in (0, d // 2, d - 1)]
    axes.append(np.ones(d) / np.sqrt(d))
    axes += [a / np.linalg.norm(a) for a in np.random.default_rng(9).normal(size=(3, d))]
    law = stats.beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)
    smallest = min(float(stats.kstest(directions_TD @ a, law.cdf).pvalue) for a in axes)
    assert len(axes) * smallest > REJECT, "directions are not uniform"
    # The whole second moment: a sampler that correlates coordinates has a large eigenvalue.
    count = len(directions_TD)
    largest = float(np.linalg.eigvalsh(d * directions_TD.T @ directions_TD / count)[-1])
    edge = (1 + np.sqrt(d / count)) ** 2
    assert largest < edge * 1.15 + 0.05, "directions prefer an axis"


def check_one_radius_per_token(noise_TD: Values) -> None:
    """Norms differ, do not depend on the norm before, nor on the direction."""
    norms_T = norms_of(noise_TD)
    assert np.ptp(norms_T) > 1e-6 * norms_T.mean(), "all tokens share one radius"
    assert len(np.unique(norms_T)) > 0.9 * len(norms_T), "tokens share radii"
    serial = stats.spearmanr(norms_T[:-1], norms_T[1:]).pvalue
    towards = stats.spearmanr(norms_T, noise_TD[:, 0] / norms_T).pvalue
    assert 2 * min(serial, towards) > REJECT, "radii depend on each other or on the direction"


def check_dchi(noise_TD: Values, eta: float) -> None:
    """The whole law of d_chi noise."""
    check_one_radius_per_token(noise_TD)
    check_gamma_radius(norms_of(noise_TD), noise_TD.shape[1], eta)
    check_uniform_directions(directions_of(noise_TD))


def check_gaussian(noise_TD: Values, sigma: float) -> None:
    """The whole law of N(0, sigma^2 I)."""
    check_one_radius_per_token(noise_TD)
    check_chi_radius(norms_of(noise_TD), noise_TD.shape[1], sigma)
    check_uniform_directions(directions_of(noise_TD))


def check_matrix_gaussian(noise_BTD: Values, sigma: float) -> None:
    """Independent matrices with independent coordinates N(0, sigma^2).

    Norms of whole matrices follow a chi law with T d degrees of freedom; contractions a' Z b with
    unit vectors are N(0, sigma^2); rows and columns are uncorrelated.
    """
    matrices, tokens, d = noise_BTD.shape
    flat_BN = noise_BTD.reshape(matrices, tokens * d)
    check_chi_radius(norms_of(flat_BN), tokens * d, sigma)
    rng = np.random.default_rng(10)
    for _ in range(6):
        a_T, b_D = rng.normal(size=tokens), rng.normal(size=d)
        contracted = np.einsum("btd,t,d->b", noise_BTD, a_T, b_D)
        scale = sigma * np.linalg.norm(a_T) * np.linalg.norm(b_D)
        assert follows(contracted, stats.norm(scale=scale)), "a contraction is not normal"
    check_gaussian(noise_BTD.reshape(matrices * tokens, d), sigma)
    check_independent(list(noise_BTD.transpose(1, 0, 2).reshape(tokens, -1)))
    check_independent(list(noise_BTD.transpose(2, 0, 1).reshape(d, -1)))


def check_independent(draws: list[Values]) -> None:
    """Draws of one size each are uncorrelated with each other (Bonferroni-corrected)."""
    correlation = np.corrcoef([np.ravel(d) for d in draws])
    off = correlation[~np.eye(len(draws), dtype=bool)]
    bound = stats.norm.isf(REJECT / max(len(off), 1)) / np.sqrt(np.size(draws[0]))
    assert np.abs(off).max() < bound, "draws are correlated"


def exact_delta(epsilon: float, ratio: float) -> float:
    """Integrate max(0, p - e^epsilon q) for p = N(ratio, 1), q = N(0, 1): the hockey stick.

    By quadrature rather than by the formula that is being checked.
    """
    start = epsilon / ratio + ratio / 2

    def excess(x: float) -> float:
        return float(stats.norm.pdf(x - ratio) * -np.expm1(epsilon - ratio * x + ratio**2 / 2))

    # p - e^epsilon q is positive beyond `start`; pieces, so that quadrature sees the peak.
    ends = np.sort(np.unique([start, *np.maximum(start, ratio + np.arange(-8.0, 41.0))]))
    pieces = itertools.pairwise(ends)
    return sum(integrate.quad(excess, low, high, epsrel=1e-11)[0] for low, high in pieces)


def check_calibration(sigma: float, sensitivity: float, epsilon: float, delta: float) -> None:
    """Sigma meets the analytic condition, and 1 % less would violate it."""
    assert exact_delta(epsilon, sensitivity / sigma) <= delta * (1 + 1e-6), "sigma is too small"
    tighter = exact_delta(epsilon, sensitivity / (0.99 * sigma))
    assert tighter > delta, "sigma is larger than needed"


def check_grid(decoded_ND: Values, wire: str) -> None:
    """Decoded rows lie on the wire's grid: rounding came last."""
    if wire == "float16":
        assert np.array_equal(decoded_ND.astype(np.float16).astype(np.float32), decoded_ND), wire
        return
    step_N1 = np.abs(decoded_ND).max(axis=1, keepdims=True).astype(np.float64) / 127
    steps = decoded_ND / step_N1
    assert np.abs(steps - np.rint(steps)).max() < 1e-3, wire
