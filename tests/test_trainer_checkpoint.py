"""Training on released rows, and going on after a kill as if there had been none."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_kit import HIDDEN, Device

from privtune_flwr.config import TrainConfig
from privtune_flwr.models import CutModel, parameter_groups
from privtune_flwr.protocol import read_release
from privtune_flwr.training import checkpoint
from privtune_flwr.training.store import SmashedStore
from privtune_flwr.training.trainer import (
    TopModelTrainer,
    accuracy_and_loss,
    pick_device,
    schedule_factor,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")
KEY = ("a", "train", 0, 0)


def config(**values: Any) -> TrainConfig:
    return TrainConfig(**{"learning_rate": 5e-4, "batch_size": 16, "device": "cpu"} | values)


@pytest.fixture(scope="module")
def stored(make_device: Callable[..., Device], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Rows and examples of one device's release, as the cloud keeps them."""
    device = make_device()
    # which examples come, and their noise, are a function of the secret
    (device.root / "secret").touch(0o600)
    (device.root / "secret").write_bytes(bytes(range(32)))
    request = device.request(chunk_size=48, max_length=24)
    known = {"device_id": device.home.device_id, "examples": 48, "hidden": HIDDEN, "num_labels": 2}
    chunk = read_release(device.ask(request).content, request, **known)
    store = SmashedStore(tmp_path_factory.mktemp("store"), hidden=HIDDEN, dtype="float32")
    assert chunk.labels_B is not None
    store.append(KEY, chunk.rows_ND, chunk.lengths_B.tolist(), chunk.labels_B.tolist())
    return store.training_rows(), store.examples(KEY)


@pytest.fixture
def make_trainer(minilm: CutModel) -> Callable[..., TopModelTrainer]:
    def make(**values: Any) -> TopModelTrainer:
        settings = config(**values)
        top = copy.deepcopy(minilm.top)
        groups = parameter_groups(top, lr=settings.learning_rate, head_lr=1e-3, weight_decay=0.01)
        return TopModelTrainer(top, groups, settings, seed=0)

    return make


def train(trainer: TopModelTrainer, stored: Any, rounds: range) -> list[float]:
    losses: list[float] = []
    for number in rounds:
        steps = trainer.train_pass(*stored, round_number=number, total_steps=12)
        losses += [step.loss for step in steps]
    return losses


# ----------------------------------------------------------------------------------------- trainer


def test_the_schedule_rises_then_falls_as_configured() -> None:
    def factors(**values: Any) -> list[float]:
        return [schedule_factor(step, 10, config(**values)) for step in range(11)]

    linear = factors(schedule="linear", warmup=0.2)
    assert linear == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    cosine = factors(schedule="cosine", warmup=0.0)
    assert cosine == pytest.approx([0.5 * (1 + np.cos(np.pi * s / 10)) for s in range(11)])
    assert factors(schedule="constant", warmup=0.0) == [1.0] * 11
    assert factors(schedule="constant", warmup=0.25)[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    # a resumed or lengthened run may go past its last step
    assert schedule_factor(50, 10, config()) == 0.0


def test_the_loss_falls_on_released_rows(
    make_trainer: Callable[..., TopModelTrainer], stored: Any
) -> None:
    trainer = make_trainer()
    rows, examples = stored
    labels = [e.label for e in examples]
    before = accuracy_and_loss(trainer.logits(rows, examples), labels)
    seen: list[int] = []
    for number in range(1, 5):
        trainer.train_pass(
            rows,
            examples,
            round_number=number,
            total_steps=12,
            on_step=lambda step: seen.append(step.number),
        )
    after = accuracy_and_loss(trainer.logits(rows, examples), labels)
    assert seen == list(range(1, 13))
    assert after[1] < 0.6 * before[1]
    assert after[0] > max(0.85, before[0])


def test_learning_rates_follow_the_schedule_in_every_group(
    make_trainer: Callable[..., TopModelTrainer], stored: Any
) -> None:
    trainer = make_trainer(warmup=0.0)
    steps = trainer.train_pass(*stored, round_number=1, total_steps=6)
    assert [s.learning_rate / 5e-4 for s in steps] == pytest.approx([1, 5 / 6, 4 / 6])
    ratios = {group["lr"] / (4 / 6) for group in trainer.optimizer.param_groups}
    assert sorted(ratios) == pytest.approx([5e-4, 1e-3])


def test_logits_come_in_the_order_of_the_examples(
    make_trainer: Callable[..., TopModelTrainer], stored: Any
) -> None:
    rows, examples = stored
    trainer = make_trainer()
    together = trainer.logits(rows, examples[:6])
    alone = np.concatenate([trainer.logits(rows, [e]) for e in examples[:6]])
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.ptp(together, axis=0).max() > 1e-3


def test_accuracy_and_loss_by_hand() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    accuracy, loss = accuracy_and_loss(logits, [0, 1, 0])
    assert accuracy == pytest.approx(1 / 3)
    assert loss == pytest.approx((2 * np.log(1 + np.exp(-2)) + 2 + np.log(2)) / 3)


def test_a_named_device_is_taken_as_it_is() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_resumed_run_goes_on_bit_by_bit(
    optimizer: str, make_trainer: Callable[..., TopModelTrainer], stored: Any, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    unbroken = make_trainer(optimizer=optimizer)
    train(unbroken, stored, range(1, 2))
    progress = checkpoint.Progress(round=1, rounds=[{"round": 1, "loss": 0.5}], seconds=3.5)
    progress.traffic["a"] = {"up": 1, "down": 2, "messages": 3}
    checkpoint.save(path, unbroken, progress)
    losses = train(unbroken, stored, range(2, 3))

    resumed = make_trainer(optimizer=optimizer)
    torch.manual_seed(1)
    assert checkpoint.load(path, resumed) == progress
    assert resumed.steps == 3
    assert train(resumed, stored, range(2, 3)) == losses
    ours, theirs = unbroken.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    trainer = small_trainer()
    before = trainer.model.weight.clone()
    assert checkpoint.load(tmp_path / "checkpoint.pt", trainer) is None
    assert torch.equal(trainer.model.weight, before)


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {}, "progress": _Trap(tmp_path / "sprung")}, path)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path, small_trainer())
    assert not (tmp_path / "sprung").exists()


def small_trainer() -> TopModelTrainer:
    model = torch.nn.Linear(300, 300)
    groups = [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}]
    return TopModelTrainer(model, groups, config(), seed=0)


SAVES = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_trainer_checkpoint import checkpoint, small_trainer
trainer, number = small_trainer(), 0
while True:
    number += 1
    torch.nn.init.constant_(trainer.model.weight, number)
    trainer.steps = number
    checkpoint.save(Path(sys.argv[1]), trainer, checkpoint.Progress(round=number))
"""


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    here = str(Path(__file__).parent)
    writer = subprocess.Popen([sys.executable, "-c", SAVES, str(path), here])
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        assert writer.poll() is None
        time.sleep(0.01)
    # looked at many times while it is being replaced: always one of them, whole
    for _ in range(50):
        _check_whole(path)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    last = _check_whole(path)
    assert last > 1
    trainer = small_trainer()
    checkpoint.save(path, trainer, checkpoint.Progress(round=last + 1))
    assert checkpoint.load(path, trainer) == checkpoint.Progress(round=last + 1)


def _check_whole(path: Path) -> int:
    trainer = small_trainer()
    progress = checkpoint.load(path, trainer)
    assert progress is not None
    assert trainer.steps == progress.round
    assert bool((trainer.model.weight == progress.round).all())
    return progress.round
