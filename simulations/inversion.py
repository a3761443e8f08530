"""What a cloud reads from federated updates: ``python -m simulations.inversion``.

MiniLM on movie-snippets, three devices of twenty. Each update is made by the code that devices
run, then read by an honest-but-curious cloud (:mod:`privtune_flwr.audit.updates`). Full weights,
LoRA and soft prompts; plain SGD and AdamW; one step on 1, 4 or 16 sentences, and a device's whole
round (160 sentences in five steps); what DP-FedAvg's clipping and DP-SGD on the device change.
Adapters start at zero and say little before they have moved, so LoRA is attacked in the second
round as well. So are the updates of the default bottleneck's learning phase, and the rows that
SplitFed's devices send, at the settings of the comparison. Rows go to
``simulations/results/inversion.json``; a row that is there is kept.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from privtune_flwr.audit.updates.attacks import attack_update, best_attack, over_devices
from privtune_flwr.audit.updates.base import CloudKnowledge, Update
from privtune_flwr.audit.updates.run import clipped
from privtune_flwr.config import RunConfig, Scalar, flatten, load_run_config
from privtune_flwr.data import (
    device_part,
    load_public_text,
    load_source,
    split_source,
    tokenise,
)
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.weights import WeightsMethod
from privtune_flwr.models import load_tokenizer, resolve_model
from privtune_flwr.privacy.learning import State
from simulations.inversion_learning import LearningPhase
from simulations.inversion_splitfed import compared, read_rounds
from simulations.study import RESULTS, add_row, stored_rows

DEVICES = 3
PARTS = 20
WHOLE = 160
SECONDS = 20.0  # to put one device's sentences together
LABELS = ("negative", "positive")
#: Round, and rank of the adapters in the blocks (0: whole blocks).
LEARNING = {
    "learning-adamw-round": (1, 0),
    "learning-adamw-round-later": (2, 0),
    "learning-lora-adamw-round": (1, 8),
    "learning-lora-adamw-round-later": (2, 8),
}
#: Which round of SplitFed, and its number.
SPLITFED = {
    "splitfed-lora-adamw-round": ("first", 1),
    "splitfed-lora-adamw-round-later": ("later", 2),
}
_PUBLIC: list[NDArray[np.int32]] = []
# each at the larger end of what trains, so that a gradient is not lost in float32's rounding
RATES: dict[tuple[str, str], float] = {
    ("full", "sgd"): 0.05,
    ("lora", "sgd"): 0.05,
    ("prompt", "sgd"): 0.05,
    ("full", "adamw"): 5e-5,
    ("lora", "adamw"): 5e-4,
    ("prompt", "adamw"): 5e-5,
}


@dataclass(frozen=True)
class Setting:
    """One row: what is trained, how, on how many sentences a step.

    Attributes
    ----------
    batch : int
        Sentences of the one step; 0 = a device's whole round.
    round : int
        1, or 2 where adapters have moved before.
    guard : str
        ``none``, ``clip`` (DP-FedAvg's device part, before the cloud's noise) or ``dp-sgd``.
    """

    tuning: str
    optimizer: str
    batch: int
    round: int = 1
    guard: str = "none"
    changes: dict[str, Scalar] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Name the row."""
        size = f"batch-{self.batch}" if self.batch else "round"
        parts = [self.tuning, self.optimizer, size]
        parts += ["later"] if self.round > 1 else []
        parts += [self.guard] if self.guard != "none" else []
        return "-".join(parts)

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        rate = RATES[self.tuning, self.optimizer]
        keys: dict[str, Scalar] = {
            "train.strategy": "dp-fedavg" if self.guard == "clip" else "fedavg",
            "train.optimizer": self.optimizer,
            "train.learning-rate": rate,
            "train.batch-size": self.batch or 32,
            "model.tuning": self.tuning,
            **({"train.head-learning-rate": rate} if self.optimizer == "sgd" else {}),
            **({"federated.example-privacy": "dp-sgd"} if self.guard == "dp-sgd" else {}),
            **self.changes,
        }
        return load_run_config(flatten(RunConfig()) | keys)


def settings() -> list[Setting]:
    """List all rows."""
    found = []
    # what devices really send first: AdamW, a whole round
    for optimizer in ("adamw", "sgd"):
        for batch in (1, 0, 4, 16):
            for tuning in ("full", "lora", "prompt"):
                found.append(Setting(tuning, optimizer, batch, round=2 if tuning == "lora" else 1))
    found += [Setting(t, "adamw", 0, guard="dp-sgd") for t in ("full", "lora")]
    found += [Setting("full", "adamw", 0, guard="clip")]
    found.append(Setting("full", "sgd", 1, guard="clip", changes={"federated.update-clip": 0.01}))
    found += [Setting("lora", o, b) for o in ("adamw", "sgd") for b in (0, 1)]
    return found


@cache
def _pool() -> Any:
    return split_source(load_source("movie-snippets"), RunConfig().data, seed=0).pool


def _public(tokenizer: Any) -> Sequence[NDArray[np.int32]]:
    if not _PUBLIC:
        texts = load_public_text(RunConfig().data.public_corpora)
        _PUBLIC.extend(tokenise(tokenizer, texts, 128))
    return _PUBLIC


def _text(device: int, size: int, tokenizer: Any) -> tuple[list[NDArray[np.int32]], list[int]]:
    part = device_part(
        _pool(), RunConfig().data, partition_id=device, num_partitions=PARTS, seed=0
    ).train
    size = size or WHOLE
    return tokenise(tokenizer, list(part["text"])[:size], 128), list(part["label"])[:size]


def measured(setting: Setting) -> dict[str, Any]:
    """Make the updates of a setting and attack them."""
    config = setting.config
    method = WeightsMethod(FitSettings.of(config), Path(resolve_model("minilm")), LABELS)
    knowledge = CloudKnowledge(method.model, _public(method.model.parts.tokenizer))
    begun = time.process_time()
    start = method.model.state()
    if setting.round > 1:
        # the cloud's state after a round of another device
        start = _fit(method, start, PARTS - 1, 64, 1, knowledge).received
    devices = []
    for device in range(DEVICES):
        update = _fit(method, start, device, setting.batch, setting.round, knowledge)
        if setting.guard == "clip":
            update = clipped(update, config.federated.update_clip)
        ids, _ = _text(device, setting.batch, knowledge.tokenizer)
        devices.append(attack_update(update, ids, knowledge, seconds=SECONDS))
    return {
        "tuning": setting.tuning,
        "optimizer": setting.optimizer,
        "batch": setting.batch,
        "round": setting.round,
        "guard": setting.guard,
        "learning_rate": config.train.learning_rate,
        **_summary(devices),
        "seconds": time.process_time() - begun,
    }


def measured_learning(number: int, lora_rank: int) -> dict[str, Any]:
    """Attack the updates of the default bottleneck's learning phase, in round 1 or 2."""
    begun = time.process_time()
    tokenizer = load_tokenizer(Path(resolve_model("minilm")))
    phase = LearningPhase(RunConfig().model.cut, LABELS, _public(tokenizer), lora_rank=lora_rank)
    state = phase.learner.start()
    if number > 1:
        ids, labels = _text(PARTS - 1, 0, tokenizer)
        _, state = phase.update(state, ids, labels, number=1, seed=PARTS - 1)
    devices = []
    for device in range(DEVICES):
        ids, labels = _text(device, 0, tokenizer)
        update, _ = phase.update(state, ids, labels, number=number, seed=device)
        devices.append(attack_update(update, ids, phase.knowledge, seconds=SECONDS))
    return {
        "tuning": "learning",
        "optimizer": "adamw",
        "batch": 0,
        "round": number,
        "guard": "none",
        "learning_rate": phase.rate,
        **_summary(devices),
        "seconds": time.process_time() - begun,
    }


def measured_splitfed(kind: str, number: int) -> dict[str, Any]:
    """Attack the rows of a bottom model that moves, in the first round or the second."""
    begun = time.process_time()
    config, _ = compared()
    return {
        "tuning": "splitfed",
        "optimizer": config.train.optimizer,
        "batch": 0,
        "round": number,
        "guard": "none",
        "learning_rate": config.train.learning_rate,
        **_summary(read_rounds(DEVICES)[kind]),
        "seconds": time.process_time() - begun,
    }


def _summary(devices: list[dict[str, Any]]) -> dict[str, Any]:
    attacks = {name: over_devices(devices, name) for name in devices[0]}
    best = best_attack(attacks)
    return {"attack": best, **attacks[best], "attacks": attacks, "per_device": devices}


def _fit(
    method: WeightsMethod,
    state: State,
    device: int,
    size: int,
    number: int,
    knowledge: CloudKnowledge,
) -> Update:
    ids, labels = _text(device, size, knowledge.tokenizer)
    key = hashlib.sha256(f"inversion study, device {device}".encode()).digest()
    work = Work(ids, labels, number, method.settings.rounds, 0.0, device, {}, noise_key=key)
    received = dict(method.fit(state, work).arrays)
    return Update(state, received, len(ids), number, method.settings.rounds)


def main(
    only: Annotated[str, typer.Option(help="Rows whose name has this in it.")] = "",
    figure: Annotated[Path | None, typer.Option(help="Draw the rows into this SVG.")] = None,
) -> None:
    """Measure the rows that are not there yet."""
    target = RESULTS / "inversion.json"
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    command = f"python -m simulations.inversion {' '.join(sys.argv[1:])}".strip()
    work: dict[str, Callable[[], dict[str, Any]]] = {
        **{setting.name: partial(measured, setting) for setting in settings()},
        **{name: partial(measured_learning, *work) for name, work in LEARNING.items()},
        **{name: partial(measured_splitfed, *work) for name, work in SPLITFED.items()},
    }
    for name, measure in work.items():
        # read anew each time: another process may share the work
        done = {row["name"] for row in stored_rows(target)}
        if name in done or only not in name:
            continue
        if "dp-sgd" in name and importlib.util.find_spec("opacus") is None:
            print(f"{name}: left out, DP-SGD needs the extra with opacus")
            continue
        row = measure()
        add_row(target, {"name": name, "command": command, **row}, {"devices": DEVICES})
        print(
            f"{name}: content words {row['content_recall']:.3f} by {row['attack']}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
    if figure is not None:
        from simulations.inversion_figure import draw_inversion

        draw_inversion(figure, stored_rows(target))


if __name__ == "__main__":
    typer.run(main)
