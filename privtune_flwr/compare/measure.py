"""What one finished run says, in a comparison's units: a device's share of everything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Work that devices do; ``results.json`` sums it over devices.
DEVICE_WORK = ("fit", "bottom", "mechanism", "codec", "learn", "backward")
Point = dict[str, float]


@dataclass(frozen=True)
class Figures:
    """One run's figures; bytes, messages and seconds are those of one device, on average.

    Attributes
    ----------
    accuracy : float or None
        Share of the public test set, after the last round.
    perplexity : float or None
        Of the public test set's labels, after the last round: the exponential of the mean
        cross-entropy in nats.
    bytes_up, bytes_down, messages : float
        Of training: provisioning and evaluation are left out.
    model_bytes : float or None
        What a device must hold first: model parts and public artefacts.
    device_seconds : float
        Compute on a device, measured there, this machine's.
    device_peak_bytes : float
        Largest memory of a device's process.
    cloud_seconds : float
        The cloud's training or averaging, and its own learning of a mechanism.
    wall_seconds : float
        The rounds in this simulation, tests left out.
    points : list of dict
        The learning curve: ``epoch``, ``accuracy``, and what a device had spent by then, ``bytes``
        and ``seconds``.
    """

    accuracy: float | None
    perplexity: float | None
    bytes_up: float
    bytes_down: float
    messages: float
    model_bytes: float | None
    device_seconds: float
    device_peak_bytes: float
    cloud_seconds: float
    wall_seconds: float
    points: list[Point]


def measure(results: Mapping[str, Any]) -> Figures:
    """Read a run's ``results.json``."""
    devices = count_devices(results)
    training, seconds = results["traffic"]["training"], results["seconds"]
    rounds = results["per_round"]
    timed = bool(rounds) and all("seconds_round" in r for r in rounds)
    accuracy, loss = (results["final"].get(f"test_{name}") for name in ("accuracy", "loss"))
    return Figures(
        accuracy=None if accuracy is None else float(accuracy),
        perplexity=None if loss is None else math.exp(loss),
        bytes_up=training["bytes_up"] / devices,
        bytes_down=training["bytes_down"] / devices,
        messages=training["messages"] / devices,
        model_bytes=results["traffic"].get("model_bytes"),
        device_seconds=sum(seconds.get(key, 0.0) for key in DEVICE_WORK) / devices,
        device_peak_bytes=float(results["memory"]["device_peak_bytes"]),
        cloud_seconds=float(seconds["top"]) + float(seconds.get("start", 0.0)),
        wall_seconds=sum(r["seconds_round"] for r in rounds) if timed else seconds["total"],
        points=curve(results),
    )


def count_devices(results: Mapping[str, Any]) -> int:
    """Count the devices that took part, those that were left out later included."""
    accounts = results["traffic"].get("devices") or {}
    return max(1, len(accounts), int(results["devices"]["used"]))


def device_work(record: Mapping[str, Any]) -> float:
    """Sum a round's seconds of work on devices, over devices."""
    return float(sum(record.get(f"seconds_{key}", 0.0) for key in DEVICE_WORK))


def curve(results: Mapping[str, Any]) -> list[Point]:
    """Give accuracy on the public test set by epoch, and what a device had spent by then.

    An epoch is one pass over all training examples. Split tuning's release rounds are parts of
    the first one; learning rounds before them are no epoch, but they cost bytes and seconds.
    """
    devices, epochs = count_devices(results), float(results["config"]["train.epochs"])
    described = float(results["examples"]["train_described"])
    rounds: Sequence[Mapping[str, Any]] = results["per_round"]
    fits = [r for r in rounds if r["kind"] != "learn"]
    by_examples = all(r["kind"] in ("release", "train") for r in fits) and described > 0
    points: list[Point] = []
    spent, trained, number = 0.0, 0.0, 0
    for record in rounds:
        spent += device_work(record)
        if record["kind"] == "learn":
            continue
        number += 1
        trained += float(record.get("examples", 0))
        if "test_accuracy" not in record:
            continue
        epoch = trained / described if by_examples else epochs * number / len(fits)
        point = {
            "epoch": min(epochs, epoch),
            "accuracy": float(record["test_accuracy"]),
            "seconds": spent / devices,
        }
        if "bytes_up" in record:
            point["bytes"] = (record["bytes_up"] + record["bytes_down"]) / devices
        points.append(point)
    return points


def guarantee(results: Mapping[str, Any]) -> dict[str, Any]:
    """Say what protects an example or a device formally, and against whom.

    Returns
    -------
    dict
        ``epsilon``, ``delta``, ``per`` (what it is of), ``bits`` a token at most, ``eta``,
        ``against`` and the full ``statement``; None where there is none. ``learning``: ``rounds``
        and ``epsilon`` of the updates that a mechanism's learned parts took; None without such.
    """
    privacy = results["privacy"]
    learning = privacy.get("learning")
    return {
        "epsilon": privacy.get("epsilon", privacy.get("epsilon_max")),
        "delta": privacy.get("delta"),
        "per": privacy.get("epsilon_per") or _unit(privacy),
        "bits": privacy.get("bits_max"),
        "eta": privacy.get("eta_max"),
        "against": privacy.get("adversary"),
        "statement": privacy.get("statement"),
        "learning": learning and {key: learning[key] for key in ("rounds", "epsilon")},
    }


def _unit(privacy: Mapping[str, Any]) -> str | None:
    """Say what a baseline's epsilon is of; split tuning's ``unit`` is a length."""
    if privacy.get("epsilon") is None:
        return None
    unit = privacy.get("unit")
    return unit if isinstance(unit, str) else "example"


def cloud_sees(said: str, results: Mapping[str, Any]) -> str:
    """Say what the cloud gets, the updates of a mechanism's learning phase included."""
    rounds = int(results.get("learning_rounds", 0))
    return said + (f"; updates of the mechanism in {rounds} learning rounds" if rounds else "")


def attacked(folder: Path) -> bool:
    """Whether somebody attacked what the run's cloud received."""
    return _audited(folder).is_file() or _inverted(folder).is_file()


def _audited(folder: Path) -> Path:
    return folder / "audit" / "audit.json"


def _inverted(folder: Path) -> Path:
    return folder / "inversion.json"


def attack(folder: Path) -> dict[str, Any] | None:
    """Read how much of the text an attacker gets out of what the cloud received in a run.

    Parameters
    ----------
    folder : Path
        The run's. ``audit/audit.json`` (``privtune audit``) speaks of representations: shares of
        the positions of sentences. ``inversion.json`` speaks of updates
        (:mod:`privtune_flwr.audit.updates.run`): shares of a device's distinct tokens.

    Returns
    -------
    dict or None
        ``tokens`` and ``content`` as shares that the best attack reads, ``of`` what they are, and
        ``by``; ``floor`` is what a blind guess reads of both, ``unaware`` (representations) what
        an attacker does who does not know the perturbation, or None. None where nobody attacked
        the run, no attack is for what it sent, or the audit's canaries say that it is not valid.
    """
    audited, inverted = _audited(folder), _inverted(folder)
    if audited.is_file():
        from privtune_flwr.audit.attacks.base import LEVELS
        from privtune_flwr.audit.summary import best_value

        audit = json.loads(audited.read_text(encoding="utf-8"))
        levels = [level for level in LEVELS if level in audit["best"]]
        if not levels or audit["valid"] is False:
            return None
        strongest = levels[-1]
        measures = {"tokens": "top1", "content": "content_top1"}
        floor = audit["floors"]["constant"]
        return {
            **{key: best_value(audit, strongest, name) for key, name in measures.items()},
            "of": "positions",
            "by": f"audit, {strongest}",
            "floor": {key: floor[name]["value"] for key, name in measures.items()},
            "unaware": {key: best_value(audit, "unaware", name) for key, name in measures.items()}
            if "unaware" in audit["best"]
            else None,
        }
    if inverted.is_file():
        found = json.loads(inverted.read_text(encoding="utf-8"))
        if found["attack"] == "none":
            return None  # nothing was tried, which is not the same as nothing read
        measures = {"tokens": "token_recall", "content": "content_recall"}
        return {
            **{key: found[name] for key, name in measures.items()},
            "of": "distinct tokens",
            "by": f"update inversion, {found['attack']}",
            "floor": {key: found["floor"][name] for key, name in measures.items()},
            "unaware": None,
        }
    return None
