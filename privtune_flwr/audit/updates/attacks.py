"""All attacks on one update, the best first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import NOTHING, CloudKnowledge, Reading, Update
from privtune_flwr.audit.updates.judge import f1, judge
from privtune_flwr.audit.updates.rows import Rows
from privtune_flwr.audit.updates.span import SpanCheck

#: What a result says where no attack can be tried on what is sent.
NO_ATTACK = "none"


def attack_update(
    update: Update,
    truth: Sequence[NDArray[Any]],
    knowledge: CloudKnowledge,
    *,
    seconds: float = 20.0,
) -> dict[str, Any]:
    """Run every attack that fits an update and judge each.

    Parameters
    ----------
    update : Update
    truth : sequence of int arrays (T,)
        The device's sentences: only the judge sees them.
    knowledge : CloudKnowledge
    seconds : float
        For putting sentences together.

    Returns
    -------
    dict
        Attack to the figures of :func:`~privtune_flwr.audit.updates.judge.judge` and ``said``;
        under ``none`` what reading nothing comes to, beside its floor.
    """
    found: dict[str, Any] = {}
    for attack in (Rows(), SpanCheck(seconds=seconds)):
        if attack.why_not(update, knowledge):
            continue
        reading = attack.read(update, knowledge)
        found[attack.name] = {**judge(reading, truth, knowledge), "said": reading.said}
    return found or {NO_ATTACK: judge(Reading(NOTHING), truth, knowledge)}


def best_attack(found: dict[str, Any]) -> str:
    """Name the attack that read most: content words first, then positions."""
    return max(found, key=lambda a: (f1(found[a]), found[a]["positions"] or 0.0))


def over_devices(devices: Sequence[dict[str, Any]], attack: str) -> dict[str, Any]:
    """Give an attack's mean figures over devices, and their spread (standard deviation)."""
    rows = [d[attack] for d in devices]
    names = [n for n, v in rows[0].items() if n not in ("floor", "said")]
    figures = {n: _mean([row[n] for row in rows]) for n in names}
    floor = {n: _mean([row["floor"][n] for row in rows]) for n in rows[0]["floor"]}
    spread = {n: _spread([row[n] for row in rows]) for n in names}
    return {**figures, "floor": floor, "spread": spread}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.std(known)) if known else None
