"""SplitFed: both halves train, devices remember nothing but files, and cutting changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from device_kit import Device
from federated_kit import LABELS, FederatedWire, Place, assert_same, weighted_mean
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from grid_kit import OPEN, DeviceGrid, named, run_config
from learned_kit import run_folder
from splitfed_kit import (
    ALLOWED,
    HIDDEN,
    SPLITFED_RUN,
    open_place,
    start,
    strategy_of,
)
from torch import nn

from privtune_flwr.bundle import BundleCache
from privtune_flwr.client_splitfed import batches_of
from privtune_flwr.config import ConfigError, flatten
from privtune_flwr.data import tokenise
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.splitfed import DeviceBatch, SplitFedModel, UnionTrainer
from privtune_flwr.federated.splitfed_cloud import SplitFedCloud, prepare_splitfed
from privtune_flwr.federated.splitfed_device import held_twin
from privtune_flwr.federated.whole import WholeModel, load_whole, pad
from privtune_flwr.models import CutModel, ModelError, resolve_model
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.splitfed import (
    SPLITFED,
    SplitFedRequest,
)
from privtune_flwr.training.trainer import schedule_factor
from strategies.splitfed import SplitFedTuning

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield from open_place(tmp_path, monkeypatch)


# ------------------------------------------------------------------- cutting changes no number


@pytest.fixture
def real(
    make_device: Callable[..., Device], minilm: CutModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Device, Any]]:
    """MiniLM cut at 1, and one device with real text."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(**changes: Any) -> tuple[Device, Any]:
        config = run_config(
            train__strategy="splitfed",
            model__cut=1,
            model__tuning="lora",
            model__max_length=24,
            privacy__wire="float32",
            data__train_examples=14,
            data__eval_examples=0,
            data__test_source="none",
            train__batch_size=4,
            train__epochs=2,
            # two norms bound something else than one over both halves
            train__clip_norm=1e9,
            **changes,
        )
        run = {k: v for k, v in flatten(config).items() if k.startswith(("data.", "run."))}
        device = named(make_device(run=run, partition_id=0, num_partitions=1, **OPEN), 1)
        bundles = BundleCache(device.bundles)
        monkeypatch.setattr("privtune_flwr.federated.splitfed_cloud.cloud_cache", lambda: bundles)
        return device, config

    return make


def test_one_device_trains_like_the_uncut_model(
    real: Callable[..., tuple[Device, Any]], tmp_path: Path
) -> None:
    """Two rounds: losses of every step, and all adapters at the end."""
    device, config = real(train__learning_rate=2e-3, train__head_learning_rate=5e-3)
    strategy = SplitFedTuning(prepare_splitfed(config), run_folder(tmp_path))
    first = strategy.cloud.build(device.holdings.label_names).state()
    strategy.start(cast("Grid", DeviceGrid({1: device})))
    losses = [loss for r in strategy.progress.rounds for loss in r["losses"]]
    wanted, last = uncut_training(device, strategy, first)
    assert len(losses) == 2 * 4
    assert np.ptp(losses) > 1e-2  # a thousand times what is allowed to differ
    np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)
    for name, value in strategy.state.items():
        # Adam's quotient magnifies rounding where a gradient is all but zero
        close = np.isclose(value, last[whole_name(name, 1)], atol=1e-4, rtol=0)
        assert close.mean() > 0.99, name
        if "bottom" in name:
            assert np.abs(value - first[name]).max() > 1e-3


def uncut_training(
    device: Device, strategy: SplitFedTuning, first: State
) -> tuple[list[float], State]:
    """Adapters in all blocks of the whole model, trained in one process on the same batches."""
    settings: FitSettings = strategy.cloud.settings
    config = strategy.config
    whole = load_whole(resolve_model("minilm"), settings, device.holdings.label_names)
    whole.load({whole_name(n, 1): v for n, v in first.items()})
    optimizer = torch.optim.AdamW(whole.groups())
    base = [g["lr"] for g in optimizer.param_groups]
    train = device.holdings.train
    ids = tokenise(whole.parts.tokenizer, train.texts, config.model.max_length)
    steps = 4
    losses: list[float] = []
    for number in (1, 2):
        request = strategy._request(number, 1)
        for batch in batches_of(request, device.home, [len(i) for i in ids]):
            factor = schedule_factor(len(losses), 2 * steps, config.train)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            target = torch.tensor([train.labels[i] for i in batch])
            loss = nn.functional.cross_entropy(whole(*pad([ids[i] for i in batch])), target)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, whole.state()


def whole_name(name: str, cut: int) -> str:
    """What a half's parameter is called in the uncut model (BERT)."""
    inner = "top.model.base_model.model.bert.encoder.layer."
    if name.startswith("bottom."):
        return name.replace("bottom.base.encoder.layer.", inner)
    head, layer, rest = name.partition(inner)
    if not layer:
        return head
    index, _, leaf = rest.partition(".")
    return f"{inner}{int(index) + cut}.{leaf}"


def test_a_union_step_gives_each_device_its_own_mean_gradient(place: Place) -> None:
    """As if each device had the top model at hand: not the union's mean, which shrinks with n."""
    cloud = cast("SplitFedCloud", place.cloud(**SPLITFED_RUN))
    rng = np.random.default_rng(3)
    batches = [
        DeviceBatch(
            rng.normal(size=(sum(lengths), HIDDEN)).astype(np.float32),
            np.array(lengths, dtype=np.uint16),
            np.array(labels, dtype=np.int32),
        )
        for lengths, labels in (([3, 6], [0, 1]), ([5, 2, 4], [1, 1, 0]))
    ]
    done = UnionTrainer(cloud.build(LABELS), cloud.config.train, 10).step(batches, 0)
    assert [g.shape for g in done.gradients] == [b.rows_ND.shape for b in batches]
    alone = [
        UnionTrainer(cloud.build(LABELS), cloud.config.train, 10).step([b], 0) for b in batches
    ]
    for together, single in zip(done.gradients, alone, strict=True):
        np.testing.assert_allclose(together, single.gradients[0], atol=1e-6)
        assert np.abs(together).max() > 1e-4
    assert done.loss_sum == pytest.approx(sum(a.loss_sum for a in alone), abs=1e-4)
    assert done.seen == 5


# ------------------------------------------------------------------------------- whole runs


def test_bottoms_are_averaged_by_examples_and_everything_learns(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = {n: named(place.device(n, size, **ALLOWED), n) for n, size in ((1, 20), (2, 10))}
    strategy = strategy_of(place, "run", train__epochs=3, privacy__wire="float16")
    returned: list[tuple[State, float]] = []
    averaged: list[State] = []
    take = strategy.take

    def kept(reply: Message, received: Any) -> Message:
        returned.append((received.arrays, received.metrics["weight"]))
        return SplitFedTuning._for_flower(reply, received)

    def spied(arrays: State) -> dict[str, Any]:
        averaged.append(arrays)
        return take(arrays)

    monkeypatch.setattr(strategy, "_for_flower", kept)
    monkeypatch.setattr(strategy, "take", spied)
    first = strategy.cloud.build(LABELS)
    wire = FederatedWire(devices)
    sent: list[tuple[int, str]] = []
    wire.before = lambda node, message: sent.append((node, message.metadata.message_type))
    strategy.start(cast("Grid", wire))
    rounds = strategy.progress.rounds
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert rounds[-1]["loss"] < rounds[0]["loss"] - 0.02
    assert {(r["devices"], r["examples"], r["seen"], r["steps"]) for r in rounds} == {
        (2, 24, 24, 8)
    }
    assert rounds[-1]["eval_examples"] == 6
    # batches of two (four over two devices): 16 and 8 examples are 8 and 4, and a last message each
    trains = [node for node, action in sent if action == SPLITFED]
    assert (trains.count(1), trains.count(2)) == (3 * 9 + 1, 3 * 5 + 1)
    for number in range(3):
        two = returned[2 * number : 2 * number + 2]
        assert sorted(w for _, w in two) == [8.0, 16.0]
        mean = weighted_mean([s for s, _ in two], [w for _, w in two])
        for name, value in mean.items():
            np.testing.assert_allclose(averaged[number][name], value, atol=1e-6)
    # adapters of the halves have moved, nothing else has
    start_state = first.state()
    moved = {n for n, v in strategy.state.items() if np.abs(v - start_state[n]).max() > 1e-4}
    assert any(n.startswith("bottom.") for n in moved)
    assert any(n.startswith("top.") for n in moved)
    assert all("lora" in n for n in start_state if n.startswith("bottom."))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_merged_model_answers_as_the_tuned_one(place: Place, tuning: str) -> None:
    strategy = strategy_of(place, "run", model__tuning=tuning)
    start(strategy, {1: place.device(1, 10, **ALLOWED)})
    model = strategy.model
    assert not [n for n, _ in model.bottom.named_parameters() if "lora" in n]
    tuned = strategy.cloud.build(LABELS)
    fresh = strategy.cloud.build(LABELS)
    tuned.load(strategy.state)
    ids = [np.array([2, 7, 9, 11, 3], np.int32), np.array([2, 30, 3], np.int32)]
    np.testing.assert_allclose(model.logits(ids), tuned.logits(ids), atol=1e-5)
    assert np.abs(model.logits(ids) - fresh.logits(ids)).max() > 1e-3


def test_a_killed_run_ends_like_an_unbroken_one(place: Place) -> None:
    """Killed in the middle of the second round: that round starts again, moments and all."""
    devices = {n: place.device(n, 10, **ALLOWED) for n in (1, 2)}
    fixed = {"train__epochs": 2, "train__schedule": "linear"}
    whole = start(strategy_of(place, "whole", **fixed), devices)
    broken = FederatedWire(devices)
    steps: list[int] = []

    def stop(node: int, message: Message) -> None:
        if message.metadata.message_type == SPLITFED:
            request = SplitFedRequest.from_content(message.content)
            steps.append(request.step)
            if (request.round, request.step) == (2, 3):
                raise KeyboardInterrupt

    broken.before = stop
    # the same run id, so that the same orders are drawn, on devices that know nothing of it
    others = {n: clone(place, device, n) for n, device in devices.items()}
    broken.devices = others
    with pytest.raises(KeyboardInterrupt):
        strategy_of(place, "broken", **fixed).start(cast("Grid", broken))
    resumed = start(strategy_of(place, "broken", **fixed), others)
    assert [r["round"] for r in resumed.progress.rounds] == [1, 2]
    for one, other in zip(whole.progress.rounds, resumed.progress.rounds, strict=True):
        assert one["losses"] == other["losses"]
    assert_same(whole.state, resumed.state)
    # what the broken start of round two let out is counted apart from the second start
    assert others[1].home.fit_ledger.spent().fits == devices[1].home.fit_ledger.spent().fits + 1


def clone(place: Place, device: Device, number: int) -> Device:
    """A device with the same secret and text, and without a past."""
    root = place.root / f"clone-{number}"
    node = {k: v for k, v in device.node_config.items() if k != "device-home"}
    made = Device(root, place.bundles.root, "", node, device.run_config)
    for name in ("secret", "device-id"):
        (root / name).write_bytes((device.root / name).read_bytes())
        (root / name).chmod(0o600)
    return made


def test_a_device_that_fails_is_left_out_of_its_round_only(place: Place) -> None:
    devices = {n: place.device(n, 10, **ALLOWED) for n in (1, 2)}
    strategy = strategy_of(place, "run", train__epochs=2)
    wire = FederatedWire(devices)

    def fail(node: int, reply: Message) -> Message:
        header = reply.content.config_records.get("splitfed") if reply.has_content() else None
        if node == 2 and header and (header["round"], header["step"]) == (1, 2):
            return Message(error=_crash(), metadata=reply.metadata)
        return reply

    wire.after = fail
    strategy.start(cast("Grid", wire))
    assert [r["devices"] for r in strategy.progress.rounds] == [1, 2]
    assert not strategy.fleet.quarantined


def _crash() -> Any:
    from flwr.app import Error

    return Error(code=103, reason="device failed")


# --------------------------------------------------------------------------- what cannot work


def test_a_mechanism_is_refused_and_the_message_says_what_to_set(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"set privacy\.mechanism = 'none'"):
        place.config(train__strategy="splitfed")
    with pytest.raises(ConfigError, match="example-privacy"):
        place.config(**SPLITFED_RUN, federated__example_privacy="dp-sgd")
    with pytest.raises(ModelError, match=r"model\.cut = 0"):
        place.cloud(**SPLITFED_RUN | {"model__cut": 0})
    with pytest.raises(ModelError, match=r"model\.lora-targets"):
        place.cloud(**SPLITFED_RUN, model__lora_targets="nothing")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_only_the_bottom_is_on_the_device(place: Place, tuning: str) -> None:
    cloud = cast("SplitFedCloud", place.cloud(**SPLITFED_RUN | {"model__tuning": tuning}))
    twin = held_twin(cloud.model_bundle[1], cloud.settings)
    model: SplitFedModel | WholeModel = cloud.build(LABELS)
    assert isinstance(model, SplitFedModel)
    assert twin.state().keys() == model.bottom_state().keys()
    blocks = {n.split(".")[3] for n in twin.state() if ".layer." in n}
    assert blocks == {"0", "1"}
    assert any("embeddings" in n for n in twin.state()) == (tuning == "full")
    assert all(a < b for a, b in pairwise(twin.state()))
