"""Sequential split learning: who is trained on when, and what that does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from device_kit import Device
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from grid_kit import OPEN, DeviceGrid, named, run_config, split_cloud
from learned_kit import run_folder

from privtune_flwr.config import RunConfig, flatten
from privtune_flwr.models import CutModel
from privtune_flwr.training.plan import Ask, make_plan
from privtune_flwr.training.trainer import Step
from strategies import SequentialSplit, SplitTuning
from strategies.sequential import by_device

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TRAIN = {"d0": 70, "d1": 30, "d2": 0, "d3": 65}
SMALL: dict[str, Any] = {
    "model__cut": 1,
    "model__tuning": "lora",
    "model__max_length": 24,
    "data__eval_examples": 0,
    "data__test_examples": 24,
    "train__batch_size": 4,
    "train__epochs": 2,
}
MakeDevice = Callable[..., Device]


@pytest.fixture(autouse=True)
def sender(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def devices_of(make_device: MakeDevice, config: RunConfig, count: int) -> dict[int, Device]:
    """Devices whose names and orders are the same in every run of the tests."""
    run = {k: v for k, v in flatten(config).items() if k.startswith(("data.", "run."))}
    return {
        n: named(make_device(run=run, partition_id=n - 1, num_partitions=count, **OPEN), n)
        for n in range(1, count + 1)
    }


def tune(
    kind: type[SplitTuning],
    config: RunConfig,
    minilm: CutModel,
    devices: dict[int, Device],
    path: Path,
) -> SplitTuning:
    strategy = kind(split_cloud(config, minilm, devices[1]), run_folder(path))
    strategy.start(cast("Grid", DeviceGrid(devices)))
    assert not strategy.fleet.quarantined
    assert not strategy.fleet.refused
    return strategy


# ------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("policy", ["once", "per-epoch"])
def test_a_device_releases_all_it_has_before_the_next_one(policy: str) -> None:
    config = run_config(
        train__strategy="sequential", privacy__chunk_size=32, privacy__release_policy=policy
    )
    plan = make_plan(TRAIN, {}, config)
    one = [("d0", 0, 32), ("d0", 1, 32), ("d0", 2, 6), ("d1", 0, 30)]
    one += [("d3", 0, 32), ("d3", 1, 32), ("d3", 2, 1)]
    asked = [[(a.device, a.chunk, a.examples, a.epoch) for a in r.asks] for r in plan.rounds]
    epochs = range(3 if policy == "per-epoch" else 1)
    wanted = [[(*chunk, epoch)] for epoch in epochs for chunk in one]
    assert asked == wanted + [[]] * (2 if policy == "once" else 0)


def test_chunks_are_grouped_by_device_in_order_of_first_sight() -> None:
    asks = [Ask(d, "train", n, 4) for d, n in (("b", 0), ("a", 0), ("b", 1), ("c", 0), ("a", 1))]
    groups = [[(a.device, a.chunk) for a in group] for group in by_device(asks)]
    assert groups == [[("b", 0), ("b", 1)], [("a", 0), ("a", 1)], [("c", 0)]]


# -------------------------------------------------------------------------------- the training


def test_every_epoch_goes_through_the_devices_one_by_one(
    make_device: MakeDevice, minilm: CutModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are drawn inside a device, and the schedule ends with the last of them."""
    values = SMALL | {"data__train_examples": 30, "data__test_source": "none"}
    config = run_config(**values, train__strategy="sequential", privacy__chunk_size=8)
    devices = devices_of(make_device, config, 3)
    owners: list[set[str]] = []
    planned: list[int] = []
    strategy = SequentialSplit(split_cloud(config, minilm, devices[1]), run_folder(tmp_path))

    def passes(rows: Any, examples: Any, *, round_number: int, total_steps: int) -> list[Step]:
        where = {
            example.offset: chunk.device
            for chunk in strategy.store
            for example in strategy.store.examples(chunk.key)
        }
        owners.append({where[e.offset] for e in examples})
        planned.append(total_steps)
        count = -(-len(examples) // config.train.batch_size)
        strategy.trainer.steps += count
        return [Step(strategy.trainer.steps - count + n + 1, 0.5, 0.1) for n in range(count)]

    build = strategy.cloud.build_top

    def spied(*args: Any, **kwargs: Any) -> Any:
        model, trainer = build(*args, **kwargs)
        monkeypatch.setattr(trainer, "train_pass", passes)
        return model, trainer

    monkeypatch.setattr(strategy.cloud, "build_top", spied)
    strategy.start(cast("Grid", DeviceGrid(devices)))
    order = sorted(strategy.fleet.nodes)
    # ten examples a device are two chunks: two rounds each, then one pass each in the last round
    assert owners == [{d} for d in order for _ in range(2)] + [{d} for d in order]
    assert set(planned) == {strategy.trainer.steps}
    assert strategy.trainer.steps == 3 * (2 + 1) + 3 * 3
    rounds = strategy.progress.rounds
    assert [r["kind"] for r in rounds] == ["release"] * 6 + ["train"]
    assert rounds[-1]["examples"] == 30
    assert rounds[-1]["steps"] == 9


def test_one_device_alone_is_split_tuning(
    make_device: MakeDevice, minilm: CutModel, tmp_path: Path
) -> None:
    values = SMALL | {"data__train_examples": 20, "data__test_source": "none"}
    config = run_config(**values, train__strategy="sequential", privacy__chunk_size=12)
    devices = devices_of(make_device, config, 1)
    ours = tune(SequentialSplit, config, minilm, devices, tmp_path / "a")
    usual = run_config(**values, train__strategy="split", privacy__chunk_size=12)
    theirs = tune(SplitTuning, usual, minilm, devices, tmp_path / "b")
    assert ours.progress.steps == theirs.progress.steps
    assert len(ours.progress.steps) == 3 + 2 + 5
    assert len({loss for _, loss, _ in ours.progress.steps}) == 10


def test_the_last_device_is_remembered_best(
    make_device: MakeDevice, minilm: CutModel, tmp_path: Path
) -> None:
    """With one class a device, whoever came last is what the model answers."""
    values = SMALL | {
        "data__train_examples": 48,
        "data__partitioner": "column",
        "data__partition_column": "label",
        "train__optimizer": "sgd",
        "train__learning_rate": 1e-2,
        "train__head_learning_rate": 3e-2,
        "train__schedule": "constant",
        "train__warmup": 0.0,
        "train__clip_norm": 100.0,
        "train__batch_size": 2,
        "train__epochs": 1,
    }
    config = run_config(**values, train__strategy="sequential")
    devices = devices_of(make_device, config, 2)
    classes = {d.home.device_id: set(d.holdings.train.labels) for d in devices.values()}
    assert sorted(map(len, classes.values())) == [1, 1]
    strategy = tune(SequentialSplit, config, minilm, devices, tmp_path)
    (last,) = classes[max(classes)]
    logits_BC = strategy.trainer.logits(strategy.store.training_rows(), strategy.test_examples)
    truth = np.array([e.label for e in strategy.test_examples])
    assert 0.3 < (truth == last).mean() < 0.7
    assert (logits_BC.argmax(1) == last).mean() > 0.9
    # the loss fell on the first device's class, and jumped where the other one's began
    losses = [loss for _, loss, _ in strategy.progress.steps]
    jumps = [b - a for a, b in pairwise(losses)]
    assert int(np.argmax(jumps)) == strategy.progress.rounds[0]["steps"] - 1
