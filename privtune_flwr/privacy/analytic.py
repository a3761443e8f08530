"""The exact epsilon and delta of normal noise, whatever its dimension.

Balle & Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018.
N(a, sigma^2 I) and N(b, sigma^2 I) with r = ||a - b|| / sigma are (epsilon, delta)-close if and
only if delta is at least

    Phi(r/2 - epsilon/r) - exp(epsilon) Phi(-r/2 - epsilon/r)

The classical sigma = distance sqrt(2 ln(1.25/delta)) / epsilon is proven
for epsilon <= 1 only and too small for large epsilon (at delta = 1e-5 above 8.4); it is not used.
"""

from __future__ import annotations

import math

EPSILON_RANGE = (1e-3, 1e4)
DELTA_RANGE = (1e-12, 0.5)

# Root finding errs by less than this, always to the safe side.
_SLACK = 1e-9


def gaussian_delta(epsilon: float, ratio: float) -> float:
    """Give the smallest delta at which the condition holds.

    Parameters
    ----------
    epsilon : float
        At least 0.
    ratio : float
        r > 0: distance over sigma, without unit.

    Returns
    -------
    float
        In [0, 1]; grows with the ratio and falls with epsilon.
    """
    from scipy.special import log_ndtr

    first = float(log_ndtr(ratio / 2 - epsilon / ratio))
    # In logarithms: exp(epsilon) alone would overflow.
    second = epsilon + float(log_ndtr(-ratio / 2 - epsilon / ratio))
    if second >= first:  # equal but for rounding: both are tiny
        return 0.0
    return math.exp(first) * -math.expm1(second - first)


def largest_ratio(epsilon: float, delta: float) -> float:
    """Give the largest distance over sigma that is still (epsilon, delta)-close.

    Sigma is the distance divided by it: noise calibrated by the analytic condition.

    Parameters
    ----------
    epsilon, delta : float
        Within ``EPSILON_RANGE`` and ``DELTA_RANGE``.
    """
    from scipy.optimize import brentq

    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) <= delta:
        low, high = high, 2 * high
    low = low or 1e-12
    root = brentq(lambda r: gaussian_delta(epsilon, r) - delta, low, high, xtol=1e-15, rtol=1e-12)
    return float(root) * (1 - _SLACK)


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Give the smallest epsilon at which the condition holds for a ratio and a delta.

    Parameters
    ----------
    ratio : float
        r > 0: distance over sigma.
    delta : float
        Within ``DELTA_RANGE``.

    Returns
    -------
    float
        At least 0.
    """
    from scipy.optimize import brentq

    if gaussian_delta(0.0, ratio) <= delta:
        return 0.0
    # The bound by concentrated differential privacy is never below the exact value.
    high = ratio**2 / 2 + ratio * math.sqrt(2 * math.log(1 / delta))
    root = brentq(lambda e: gaussian_delta(e, ratio) - delta, 0.0, high, xtol=1e-15, rtol=1e-12)
    return float(root) * (1 + _SLACK)
