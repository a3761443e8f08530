"""The closing record of a run: ``results.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from privtune_flwr.config import flatten
from privtune_flwr.privacy.accounting import REPORT_DELTA, update_rho, zcdp_epsilon
from privtune_flwr.privacy.learned_update import learning_statement
from privtune_flwr.usage import peak_memory_bytes

if TYPE_CHECKING:
    from strategies.split import SplitTuning

_PACKAGES = ("privtune-flwr", "flwr", "torch", "transformers", "datasets", "peft", "numpy", "ray")
_FINAL = ("test_accuracy", "test_loss", "eval_accuracy", "eval_loss", "eval_examples", "loss")
_SPENT = ("eta_total_max", "epsilon_total_max", "delta_total_max", "bits_total_max")
_SUMMED = (
    "seconds_bottom",
    "seconds_mechanism",
    "seconds_codec",
    "seconds_learn",
    "seconds_wire",
    "seconds_top",
    "seconds_decode",
)


def build_results(strategy: SplitTuning) -> dict[str, Any]:
    """Gather what a finished run has to tell.

    Returns
    -------
    dict
        Final metrics, seconds by stage, traffic, privacy, devices left out, versions and the whole
        configuration. Accuracy is a share, seconds are processor seconds summed over devices where
        devices compute and the clock's elsewhere, bytes are those of Flower's serialised content.
    """
    progress, cloud = strategy.progress, strategy.cloud
    rounds = progress.rounds
    learned = sum(r.get("kind") == "learn" for r in rounds)
    last = rounds[-1] if rounds else {}
    examples = sum(int(r.get("examples_new", 0)) for r in rounds)
    up = sum(t["up"] for t in progress.traffic.values())
    return {
        "name": strategy.folder.name,
        "final": {key: last[key] for key in _FINAL if key in last},
        "rounds": len(rounds) - learned,
        "learning_rounds": learned,
        "per_round": rounds,
        "steps": strategy.trainer.steps,
        "devices": {
            "used": len({c.device for c in strategy.store if c.split == "train"}),
            "quarantined": progress.quarantined,
            "refused": progress.refused,
        },
        "examples": {
            "train_received": examples,
            "train_described": sum(strategy.fleet.train.values()),
            "test": len(strategy.test_examples),
        },
        "traffic": {
            **traffic_sums(progress.traffic),
            "bytes_up_per_train_example": up / examples if examples else None,
            "store_bytes": strategy.store.nbytes,
            # bottom model and artefacts: what a device must hold before it releases
            "model_bytes": sum(manifest.total_bytes for manifest, _ in cloud.bundles),
        },
        "seconds": {
            **{k.removeprefix("seconds_"): sum(r.get(k, 0.0) for r in rounds) for k in _SUMMED},
            "prepare": cloud.seconds["prepare"],
            # the cloud's own learning of a mechanism, before any device's
            "start": cloud.seconds.get("start", 0.0),
            "total": progress.seconds,
        },
        "memory": {
            "driver_peak_bytes": peak_memory_bytes(),
            "device_peak_bytes": max((r.get("peak_memory_bytes", 0) for r in rounds), default=0),
        },
        "privacy": _privacy(strategy),
        "versions": versions(),
        "config": flatten(cloud.config),
    }


def traffic_sums(devices: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Sum bytes and messages over devices; ``training`` leaves provisioning and tests out."""

    def total(key: str) -> int:
        return sum(account.get(key, 0) for account in devices.values())

    apart = {
        key: total(f"provision_{key}") + total(f"evaluate_{key}")
        for key in ("up", "down", "messages")
    }
    return {
        "devices": {device: dict(account) for device, account in devices.items()},
        "bytes_up": total("up"),
        "bytes_down": total("down"),
        "messages": total("messages"),
        "training": {
            "bytes_up": total("up") - apart["up"],
            "bytes_down": total("down") - apart["down"],
            "messages": total("messages") - apart["messages"],
        },
    }


def _privacy(strategy: SplitTuning) -> dict[str, Any]:
    rounds, cloud = strategy.progress.rounds, strategy.cloud
    guarantee, strength = cloud.mechanism.guarantee(), cloud.mechanism.strength
    tokens = sum(r.get("tokens", 0) for r in rounds)
    norm = sum(r.get("noise_norm_sum", 0.0) for r in rounds)
    # the unit needs the bank, which a mechanism without parameters in units never built
    unit = cloud.spec.params.get("unit")
    # rows of another width have no distance from the clean ones
    mean = norm / tokens if tokens and cloud.width == cloud.bottom.hidden_size else None
    devices = strategy.progress.spent
    return {
        "mechanism": cloud.mechanism.name,
        "spec": cloud.spec.to_json(),
        "metric": guarantee.metric,
        "adversary": guarantee.adversary,
        "statement": guarantee.statement,
        "eta_max": guarantee.eta,
        "epsilon_max": strength.epsilon,
        "delta": strength.delta if strength.epsilon is not None else None,
        "epsilon_per": strength.per if strength.epsilon is not None else None,
        "bits_max": strength.bits,
        "mean_noise_norm": mean,
        "unit": unit,
        "mean_noise_norm_units": mean / float(unit) if mean is not None and unit else None,
        "releases_per_example": max((r.get("spent_max_per_example", 0) for r in rounds), default=0),
        # of one token over its releases; the sums over an example's tokens are under "spent"
        "spent_eta_per_token": _largest(devices, "eta_sum_max"),
        "spent": {name: _largest(devices, name) for name in _SPENT},
        "devices": devices,
        "learning": _learning(strategy),
        "decoder": cloud.uses_decoder,
    }


def _largest(devices: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    """Take the largest over devices; None where one of them has no bound, or there are none."""
    values = [account.get(name) for account in devices.values()]
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _learning(strategy: SplitTuning) -> dict[str, Any] | None:
    """Say what the learning phase told of the devices' text; None where there was none."""
    cloud = strategy.cloud
    settings = cloud.config.privacy.learning
    if not cloud.learned or settings.rounds == 0:
        return None
    rho = update_rho(settings.clip, settings.noise)
    return {
        "rounds": settings.rounds,
        "clip": settings.clip,
        "noise": settings.noise,
        "zcdp_rho": None if rho is None else settings.rounds * rho,
        "epsilon": None if rho is None else zcdp_epsilon(settings.rounds * rho),
        "delta": None if rho is None else REPORT_DELTA,
        "adjacency": "any two contents of one device with as many examples",
        "statement": learning_statement(settings.rounds, settings.clip, settings.noise),
    }


def versions() -> dict[str, str]:
    """List the versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # the app may run from Flower's copy without being installed
            found[package] = "not installed"
    return found
