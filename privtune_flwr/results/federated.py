"""The closing record of a federated baseline: the same keys as a split run's, where they apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from privtune_flwr.config import flatten
from privtune_flwr.results.report import traffic_sums, versions
from privtune_flwr.usage import peak_memory_bytes

if TYPE_CHECKING:
    from strategies.federated import FederatedTuning

_FINAL = (
    "test_accuracy",
    "test_loss",
    "eval_accuracy",
    "eval_loss",
    "eval_examples",
    "loss",
    # of the bound in which every device has a model of its own
    "test_accuracy_min",
    "test_accuracy_max",
    "test_accuracy_std",
    "devices_tested",
)
_SEEN = {
    "weights": "every weight of each device's model, after each round",
    "adapters": "each device's adapters and head, after each round",
    "prompt": "each device's soft prompt and head, after each round",
    "losses": "each device's loss for every candidate prompt",
    "logits": "each device's logits on a public set",
    "gradients": "representations, and the gradients that go back",
}
_BOUND_SEES = {
    "central": "all text",
    "local": "nothing: weights travel only so that this bound can be measured",
}


def build_federated_results(strategy: FederatedTuning) -> dict[str, Any]:
    """Gather what a finished baseline has to tell.

    Returns
    -------
    dict
        As :func:`privtune_flwr.results.report.build_results`; seconds are summed over devices
        where devices compute.
    """
    progress, cloud = strategy.progress, strategy.cloud
    method = strategy.config.train.strategy
    rounds = progress.rounds
    last = rounds[-1] if rounds else {}
    traffic = traffic_sums(progress.traffic)
    examples = sum(strategy.fleet.train.values())
    up = traffic["training"]["bytes_up"]

    def total(key: str) -> float:
        return float(sum(r.get(key, 0.0) for r in rounds))

    return {
        "name": strategy.folder.name,
        "final": {key: last[key] for key in _FINAL if key in last},
        "rounds": len(rounds),
        "learning_rounds": 0,
        "per_round": rounds,
        "steps": int(total("steps")),
        "devices": {
            "used": int(max((r.get("devices", 0) for r in rounds), default=0)),
            "quarantined": progress.quarantined,
            "refused": progress.refused,
        },
        "examples": {
            "train_received": int(last.get("examples_received", 0)),
            "train_described": examples,
        },
        "traffic": {
            **traffic,
            "bytes_up_per_train_example": up / examples if examples else None,
            "model_bytes": sum(manifest.total_bytes for manifest, _ in cloud.bundles),
        },
        "seconds": {
            "fit": total("seconds_fit"),
            "wire": total("seconds_wire"),
            "top": total("seconds_top"),
            "test": cloud.seconds["test"],
            "prepare": cloud.seconds["prepare"],
            "total": progress.seconds,
        },
        "memory": {
            "driver_peak_bytes": peak_memory_bytes(),
            "device_peak_bytes": max((r.get("peak_memory_bytes", 0) for r in rounds), default=0),
        },
        "privacy": {
            "mechanism": method,
            "cloud_sees": _BOUND_SEES.get(method) or _SEEN[cloud.settings.shares],
            **strategy.guarantee(),
            "decoder": False,
        },
        "versions": versions(),
        "config": flatten(strategy.config),
    }
