"""What a release or an update costs, in the currencies of a device's bounds.

Basic composition throughout for releases: charges of one example add up over its tokens and its
releases. Sums over mechanisms with different metrics are kept as sums; each metric is in the
ledger beside its entries. Updates of a learning phase compose as zero-concentrated differential
privacy (Bun and Steinke 2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from privtune_flwr.privacy.base import Strength

Currency = Literal["eta", "epsilon", "bits"]
CURRENCIES: tuple[Currency, ...] = ("eta", "epsilon", "bits")

#: The delta at which the report states the epsilon of a learning phase.
REPORT_DELTA = 1e-5


@dataclass(frozen=True)
class Charge:
    """What releases of one example cost; None where nothing bounds it in that currency.

    Attributes
    ----------
    eta : float or None
        Sum of eta over tokens and releases, per unit of the mechanism's distance.
    epsilon : float or None
        Sum of epsilon over releases, and over tokens where epsilon is a token's.
    delta : float
        The deltas that belong to ``epsilon``, summed alike.
    bits : float or None
        The most bits that all rows together can carry.
    """

    eta: float | None = 0.0
    epsilon: float | None = 0.0
    delta: float = 0.0
    bits: float | None = 0.0

    def of(self, currency: Currency) -> float | None:
        """Give one currency."""
        found = {"eta": self.eta, "epsilon": self.epsilon, "bits": self.bits}
        return found[currency]


def charge_of(strength: Strength, tokens: int) -> Charge:
    """Charge one release of a sentence of ``tokens`` tokens."""
    times = tokens if strength.per == "token" else 1
    return Charge(
        eta=_times(strength.eta, tokens),
        epsilon=_times(strength.epsilon, times),
        delta=strength.delta * times,
        bits=_times(strength.bits, tokens),
    )


def total(charges: Iterable[Charge]) -> Charge:
    """Add charges up; a currency in which one of them is unbounded is unbounded in the sum."""
    parts = list(charges)
    return Charge(
        eta=_sum(c.eta for c in parts),
        epsilon=_sum(c.epsilon for c in parts),
        delta=math.fsum(c.delta for c in parts),
        bits=_sum(c.bits for c in parts),
    )


def update_rho(clip: float, noise: float) -> float | None:
    """Give the zCDP of one update; None where nothing is promised.

    Neighbours are any two contents of the device with as many examples. Two updates of norm at
    most ``clip`` differ by at most ``2 clip``; the noise has standard deviation ``noise * clip``;
    hence rho = (2 clip)^2 / (2 (noise clip)^2) = 2 / noise^2.
    """
    return 2.0 / noise**2 if clip > 0 and noise > 0 else None


def zcdp_epsilon(rho: float, delta: float = REPORT_DELTA) -> float:
    """Convert rho-zCDP to the epsilon of (epsilon, delta)-differential privacy."""
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))


def _times(value: float | None, count: int) -> float | None:
    return None if value is None else value * count


def _sum(values: Iterable[float | None]) -> float | None:
    result = 0.0
    for value in values:
        if value is None:
            return None
        result += value
    return result
