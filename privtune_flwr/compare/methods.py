"""The methods a comparison knows: run-configuration keys on top of a scenario, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from privtune_flwr.section import ConfigError

Value = str | int | float | bool
#: Split: a model is cut. Federated: devices hold it whole. Bound: no federation, a line to compare.
Family = Literal["split", "federated", "bound"]

#: The rates that all methods have which train by gradients: of the body and of the head.
GRADIENT_RATES = ("train.learning-rate", "train.head-learning-rate")
#: Base rates by what is tuned, for AdamW; a grid multiplies them. A soft prompt has the head's.
BASE_RATES: dict[str, dict[str, float]] = {
    "full": {"train.learning-rate": 5e-5, "train.head-learning-rate": 1e-3},
    "lora": {"train.learning-rate": 1e-3, "train.head-learning-rate": 1e-3},
    "prompt": {"federated.prompt-learning-rate": 1e-2, "train.head-learning-rate": 1e-2},
}
#: For SGD without momentum, whose step is the gradient's size and not one of AdamW's unit steps.
SGD_RATES: dict[str, dict[str, float]] = {
    "full": {"train.learning-rate": 0.02, "train.head-learning-rate": 0.1},
    "lora": {"train.learning-rate": 1.0, "train.head-learning-rate": 1.0},
    "prompt": {"federated.prompt-learning-rate": 0.5, "train.head-learning-rate": 0.5},
}
#: Of what a mechanism learns in federated rounds before the release; nothing for one without.
LEARNING_RATES = {
    "privacy.learning.learning-rate": 1.5e-4,
    "privacy.learning.head-learning-rate": 5e-3,
}
#: For LoRA where a model is stepped on one device's share of the text, or on large batches: far
#: fewer steps than a model makes that meets every sentence, so the middle of the grid is higher.
FEW_STEPS = {"train.learning-rate": 3e-3, "train.head-learning-rate": 3e-3}


@dataclass(frozen=True)
class Method:
    """One method of a comparison.

    Attributes
    ----------
    name : str
        As in a scenario's ``compare.methods``.
    title : str
        What it is, in a few words.
    family : str
        ``split``, ``federated`` or ``bound``.
    settings : dict
        Run-configuration keys that make a scenario this method.
    sees : str
        What the cloud gets of a device.
    scaled : tuple of str
        The learning rates that the grid multiplies.
    rates : dict
        Base rates that differ from those by tuning and optimiser.
    serial : bool
        Whether devices work one after the other.
    """

    name: str
    title: str
    family: Family
    settings: Mapping[str, Value]
    sees: str
    scaled: tuple[str, ...] = GRADIENT_RATES
    rates: Mapping[str, float] = field(default_factory=dict)
    serial: bool = False

    def base_rates(self, tuning: str, optimizer: str) -> dict[str, float]:
        """Give the rates that a multiplier of 1 stands for, by key."""
        preset = (SGD_RATES if optimizer == "sgd" else BASE_RATES)[tuning]
        known = {**preset, **self.rates}
        return {key: known[key] for key in self.scaled}


def _federated(
    name: str,
    title: str,
    sees: str,
    strategy: str,
    tuning: str = "lora",
    *,
    scaled: tuple[str, ...] = GRADIENT_RATES,
    rates: Mapping[str, float] | None = None,
    **others: Value,
) -> Method:
    settings = {
        "train.strategy": strategy,
        "model.tuning": tuning,
        **{key.replace("__", ".").replace("_", "-"): value for key, value in others.items()},
    }
    return Method(name, title, "federated", settings, sees, scaled, rates or {})


_ADAPTERS = "each device's adapters and head, every round"
_METHODS = (
    Method(
        "ours",
        "split tuning, released once, through the scenario's mechanism",
        "split",
        {"train.strategy": "split"},
        "perturbed representations, once; labels",
        # the devices' learning and the cloud's training together: as many points as every method
        scaled=(*GRADIENT_RATES, *LEARNING_RATES),
        rates=LEARNING_RATES,
    ),
    Method(
        "ours-public",
        "the same, its mechanism learned on public labels of the task: no update leaves a device",
        "split",
        {
            "train.strategy": "split",
            "privacy.learning.rounds": 0,
            "privacy.learning.warm-start": "labels",
        },
        "perturbed representations, once; labels",
        scaled=(*GRADIENT_RATES, *LEARNING_RATES),
        rates=LEARNING_RATES,
    ),
    Method(
        "privtune",
        "the same through PrivTune's noise (reconstruction)",
        "split",
        {"train.strategy": "split", "privacy.mechanism": "privtune"},
        "perturbed representations, once; labels",
    ),
    Method(
        "split-clear",
        "the same without a mechanism: what ours would reach without privacy",
        "split",
        {"train.strategy": "split", "privacy.mechanism": "none"},
        "clean representations, once; labels",
    ),
    _federated(
        "fedavg", "FedAvg on all weights", "each device's weights, every round", "fedavg", "full"
    ),
    _federated("fedavg-lora", "FedAvg on LoRA adapters", _ADAPTERS, "fedavg", rates=FEW_STEPS),
    _federated("fedprox", "FedProx on LoRA adapters", _ADAPTERS, "fedprox", rates=FEW_STEPS),
    _federated(
        "fedadam",
        "FedAdam on LoRA adapters",
        _ADAPTERS,
        "fedadam",
        # devices' rates and the server's together: as many points as every method has
        scaled=(*GRADIENT_RATES, "federated.server-learning-rate"),
        rates={**FEW_STEPS, "federated.server-learning-rate": 1e-2},
    ),
    _federated(
        "scaffold",
        "SCAFFOLD on LoRA adapters",
        "each device's adapters, head and control variates, every round",
        "scaffold",
        train__optimizer="sgd",
    ),
    _federated(
        "dp-fedavg",
        "DP-FedAvg on LoRA adapters, the cloud adds the noise",
        "each device's clipped adapters and head, every round",
        "dp-fedavg",
        rates=FEW_STEPS,
    ),
    _federated(
        "dp-sgd",
        "FedAvg on LoRA adapters, DP-SGD on the devices",
        "each device's adapters and head with its own noise, every round",
        "fedavg",
        rates=FEW_STEPS,
        federated__example_privacy="dp-sgd",
    ),
    _federated(
        "prompt",
        "FedAvg on a soft prompt and the head",
        "each device's soft prompt and head, every round",
        "fedavg",
        "prompt",
        scaled=("federated.prompt-learning-rate", "train.head-learning-rate"),
    ),
    _federated(
        "bbt",
        "black-box prompt tuning, no gradient",
        "each device's loss for every candidate prompt",
        "bbt",
        "prompt",
        # no gradient, so no learning rate: the size of the search's first step is its like
        scaled=("federated.sigma",),
        rates={"federated.sigma": 0.5},
    ),
    _federated(
        "distil",
        "distillation: devices share logits on public text",
        "each device's logits on public text, every round",
        "distil",
        rates=FEW_STEPS,
    ),
    Method(
        "sequential",
        "sequential split learning, device after device, bottom model frozen",
        "split",
        {"train.strategy": "sequential", "privacy.mechanism": "none"},
        "clean representations, once; labels",
        serial=True,
    ),
    Method(
        "splitfed",
        "SplitFed, both halves with LoRA, bottom halves averaged",
        "split",
        {"train.strategy": "splitfed", "privacy.mechanism": "none", "model.tuning": "lora"},
        "clean representations at every step, bottom adapters; labels",
        rates=FEW_STEPS,
    ),
    Method(
        "central",
        "all text in one place, LoRA",
        "bound",
        {"train.strategy": "central", "model.tuning": "lora"},
        "all text",
    ),
    Method(
        "central-full",
        "all text in one place, all weights",
        "bound",
        {"train.strategy": "central", "model.tuning": "full"},
        "all text",
    ),
    Method(
        "local",
        "each device alone, LoRA; mean over devices",
        "bound",
        {"train.strategy": "local", "model.tuning": "lora"},
        "nothing",
        rates=FEW_STEPS,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
#: The line the others are held against.
CENTRAL = "central"
#: The method whose cost the others are also judged at.
OURS = "ours"


def find_method(name: str) -> Method:
    """Look a method up.

    Raises
    ------
    ConfigError
        Naming those there are.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: unknown; allowed: {', '.join(METHODS)}")
    return METHODS[name]
