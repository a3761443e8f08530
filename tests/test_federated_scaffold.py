"""SCAFFOLD: what a control variate is, that it is remembered, and that it holds the drift."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from device_kit import Device
from federated_kit import (
    LABELS,
    FederatedWire,
    Place,
    answer_of,
    ask_fit,
    assert_same,
    flat,
    model_of,
    weighted_mean,
)
from flwr.app import Message
from safetensors.numpy import load_file
from tiny_models import one_thread, sentences

from privtune_flwr.config import ConfigError
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.methods import FitMethod, Work, create_method
from privtune_flwr.federated.scaffold import CONTROL, control_change, join_parts, split_parts
from privtune_flwr.federated.whole import WholeModel, pad
from privtune_flwr.privacy.learning import State
from privtune_flwr.privacy.mods import REFUSED
from privtune_flwr.protocol.requests import REQUEST
from strategies.scaffold import ScaffoldTuning

SCAFFOLD: dict[str, Any] = {
    "train__strategy": "scaffold",
    "train__optimizer": "sgd",
    "train__learning_rate": 0.05,
    "train__head_learning_rate": 0.2,
    "train__batch_size": 64,
    "train__clip_norm": 1e6,
    "train__weight_decay": 0.0,
}
PLAIN = SCAFFOLD | {"train__strategy": "fedavg"}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path, patch)


def controls(device: Device) -> State:
    """The control variate on a device's disk."""
    path = device.root / "fit-kept.safetensors"
    kept = load_file(path) if path.exists() else {}
    own = f"memory/{CONTROL}"
    return {n.removeprefix(own): v for n, v in kept.items() if n.startswith(own)}


def run(place: Place, name: str, wire: FederatedWire, **changes: Any) -> ScaffoldTuning:
    return cast("ScaffoldTuning", place.run(name, wire, **SCAFFOLD | changes))


def gradient(model: WholeModel, work: Work) -> State:
    """By hand: the gradient of the mean loss over all examples."""
    model.zero_grad(set_to_none=True)
    logits_BC = model(*pad(list(work.sequences)))
    loss = torch.nn.functional.cross_entropy(logits_BC, torch.tensor(list(work.labels)))
    torch.autograd.backward(loss)
    found = {
        n: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy()
        for n, p in model.trainable().items()
    }
    model.zero_grad(set_to_none=True)
    return found


def work_of(labels: list[int], **changes: Any) -> Work:
    lengths = [4 + i % 5 for i in range(len(labels))]
    values: dict[str, Any] = {"round": 1, "rounds": 1, "proximal_mu": 0.0, "seed": 3, "memory": {}}
    return Work(sentences(lengths, seed=1), labels, **values | changes)


def methods(place: Place, **changes: Any) -> tuple[FitMethod, State]:
    cloud = place.cloud(**changes)
    start = model_of(cloud).state()
    return create_method(cloud.settings, cloud.model_bundle[1], LABELS), start


# ---------------------------------------------------------------------------------- on a device


def test_steps_follow_the_corrected_gradient_and_the_control_becomes_the_mean_one(
    place: Place,
) -> None:
    """Two steps by hand, under a schedule and with rates that differ by group."""
    method, start = methods(place, **SCAFFOLD | {"train__schedule": "linear"}, train__epochs=2)
    settings = method.settings
    rng = np.random.default_rng(0)
    server = {n: rng.normal(0, 0.01, v.shape).astype(np.float32) for n, v in start.items()}
    own = {n: rng.normal(0, 0.01, v.shape).astype(np.float32) for n, v in start.items()}
    memory = {f"{CONTROL}{n}": v for n, v in own.items()}
    # one round of two: the second half of the schedule, one step a pass
    work = work_of([0, 1, 0, 0, 1, 0], memory=memory, round=2, rounds=2)
    outcome = method.fit(join_parts(start, server), work)
    weights, change = split_parts(outcome.arrays)

    rates = {n: 0.2 if "classifier" in n or "pooler" in n or "score" in n else 0.05 for n in start}
    assert set(rates.values()) == {0.05, 0.2}
    assert settings.federated.local_epochs == 1
    method.model.load(start)
    factor = 0.5  # the schedule's after one step of two
    found = gradient(method.model, work)
    wanted = {n: start[n] - rates[n] * factor * (found[n] - own[n] + server[n]) for n in start}
    for name in start:
        np.testing.assert_allclose(weights[name], wanted[name], atol=1e-6)
        # one step: the control is that gradient, whatever the controls were before
        np.testing.assert_allclose(own[name] + change[name], found[name], atol=2e-5)
        kept = outcome.memory[f"{CONTROL}{name}"]
        np.testing.assert_array_equal(kept, own[name] + change[name])


def test_the_control_weighs_each_step_by_its_rate() -> None:
    start = {"a": np.array([1.0], np.float32), "b": np.array([1.0], np.float32)}
    steps = [(1.0, 2.0), (0.5, 4.0), (0.25, -1.0)]  # factor, corrected gradient
    base = {"a": 0.1, "b": 0.01}
    end = {
        n: (v - base[n] * sum(f * g for f, g in steps)).astype(np.float32) for n, v in start.items()
    }
    server = {"a": np.array([0.5], np.float32), "b": np.array([0.5], np.float32)}
    change = control_change(start, end, server, base, sum(f for f, _ in steps))
    mean = (2.0 + 2.0 - 0.25) / 1.75
    for name in start:
        np.testing.assert_allclose(change[name], mean - 0.5, rtol=1e-4)


def test_the_clouds_control_cannot_push_a_step_beyond_the_clip(place: Place) -> None:
    method, start = methods(place, **SCAFFOLD | {"train__clip_norm": 0.5}, train__epochs=1)
    huge = {n: np.full(v.shape, 1e6, np.float32) for n, v in start.items()}
    outcome = method.fit(join_parts(start, huge), work_of([0, 1, 1]))
    weights, _ = split_parts(outcome.arrays)
    moved = {n: weights[n] - start[n] for n in start}
    assert np.linalg.norm(flat(moved)) <= 0.2 * 0.5 * 1.01


def test_opposite_devices_drift_less_than_under_fedavg(place: Place) -> None:
    """Two devices with the same sentences and opposite classes: the mean model is at rest."""

    def drift(changes: dict[str, Any]) -> float:
        method, state = methods(place, **changes, federated__local_epochs=8, train__epochs=32)
        scaffold = "scaffold" in changes.values()
        control = {n: np.zeros_like(v) for n, v in state.items()}
        memories: list[State] = [{}, {}]
        for number in range(1, 5):
            sent = join_parts(state, control) if scaffold else state
            outcomes = [
                method.fit(sent, work_of([label] * 6, round=number, rounds=4, memory=memory))
                for label, memory in zip((0, 1), memories, strict=True)
            ]
            memories = [o.memory for o in outcomes]
            parts = [split_parts(o.arrays) if scaffold else (o.arrays, {}) for o in outcomes]
            answers = [weights for weights, _ in parts]
            spread = np.linalg.norm(flat(answers[0]) - flat(answers[1]))
            state = {n: v.astype(np.float32) for n, v in weighted_mean(answers, [1, 1]).items()}
            if scaffold:
                moved = weighted_mean([change for _, change in parts], [1, 1])
                control = {n: (c + moved[n]).astype(np.float32) for n, c in control.items()}
        return float(spread)

    # steps so small that gradients hardly change on the way, as the control assumes
    small = {"train__learning_rate": 0.002, "train__head_learning_rate": 0.005}
    plain, corrected = drift(PLAIN | small), drift(SCAFFOLD | small)
    assert plain > 0.02
    assert corrected < 0.3 * plain, (corrected, plain)


def test_a_retry_does_not_step_twice_and_memory_serves_the_next_round(place: Place) -> None:
    device, fresh = place.device(0, 10), place.device(1, 10)
    cloud = place.cloud(**SCAFFOLD)
    start = model_of(cloud).state()
    zeros = {n: np.zeros_like(v) for n, v in start.items()}
    sent = join_parts(start, zeros)
    first = answer_of(ask_fit(device, cloud, sent))
    memory = controls(device)
    assert_same(memory, split_parts(first)[1])
    again = answer_of(ask_fit(device, cloud, sent))
    assert_same(again, first)
    assert_same(controls(device), memory)

    # the second round starts from what is on the disk: c = c_i corrects nothing, c = 0 much
    weights, change = split_parts(first)
    equal = join_parts(weights, change)
    second = answer_of(ask_fit(device, cloud, equal, flower={"server-round": 2}))
    stepped = controls(device)
    again = answer_of(ask_fit(device, cloud, equal, flower={"server-round": 2}))
    assert_same(again, second)
    assert_same(controls(device), stepped)
    assert_same(stepped, {n: memory[n] + v for n, v in split_parts(second)[1].items()})
    moved = {n: split_parts(second)[0][n] - weights[n] for n in weights}
    plain_cloud = place.cloud(**PLAIN)
    plain = answer_of(ask_fit(device, plain_cloud, weights, flower={"server-round": 2}))
    np.testing.assert_allclose(flat(moved), flat(plain) - flat(weights), atol=1e-6)
    # a device that was never drawn has nothing to take off
    unknown = answer_of(ask_fit(fresh, cloud, equal, flower={"server-round": 2}))
    assert np.linalg.norm(flat(split_parts(unknown)[0]) - flat(weights)) > 0
    for name, value in controls(fresh).items():
        np.testing.assert_allclose(value, split_parts(unknown)[1][name], atol=1e-7)
    # and another run's memory is not this one's
    held = controls(device)
    other = ask_fit(device, cloud, equal, flower={"server-round": 2}, run_id="cd" * 16)
    for name, value in controls(device).items():
        np.testing.assert_allclose(value, split_parts(answer_of(other))[1][name], atol=1e-7)
    assert np.abs(flat(held) - flat(controls(device))).max() > 0


def test_a_state_that_is_none_is_refused(place: Place) -> None:
    device, cloud = place.device(0, 10), place.cloud(**SCAFFOLD)
    start = model_of(cloud).state()
    zeros = {n: np.zeros_like(v) for n, v in start.items()}
    whole = join_parts(start, zeros)
    name = next(n for n in sorted(whole) if n.startswith(CONTROL))
    for wrong in (
        start,
        {n: v for n, v in whole.items() if n != name},
        whole | {name: np.zeros((1, 1, 1), np.float32)},
        whole | {"other": np.zeros(1, np.float32)},
    ):
        error = ask_fit(device, cloud, wrong).error
        assert error.code == REFUSED
        assert "request.state:" in error.reason
    assert not controls(device)
    bad = cloud.settings.model_copy(
        update={"train": cloud.settings.train.model_copy(update={"optimizer": "adamw"})}
    )
    error = ask_fit(device, cloud, whole, settings=bad.to_json()).error
    assert (error.code, "train.optimizer" in error.reason) == (REFUSED, True)
    private = {
        "federated": cloud.settings.federated.model_copy(update={"example_privacy": "dp-sgd"})
    }
    with pytest.raises(Refusal, match="example-privacy"):
        create_method(cloud.settings.model_copy(update=private), place.model, LABELS)


def test_what_cannot_work_is_refused_before_the_run(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"scaffold' needs train.optimizer = 'sgd'"):
        place.config(train__strategy="scaffold")
    with pytest.raises(ConfigError, match=r"example-privacy = 'dp-sgd'"):
        place.config(**SCAFFOLD, federated__example_privacy="dp-sgd")


# ---------------------------------------------------------------------------------- in the cloud


def test_alone_a_device_goes_fedavgs_way(place: Place) -> None:
    """With one device c is its own c_i: no correction, in the second round neither."""
    devices = {1: place.device(0, 10)}
    federation = {"train__epochs": 6, "federated__local_epochs": 3}
    ours = run(place, "one", FederatedWire(devices), **federation)
    theirs = place.run("plain", FederatedWire(devices), **PLAIN | federation)
    assert ours.rounds == 2
    np.testing.assert_allclose(flat(ours.state), flat(theirs.state), atol=1e-6)
    assert np.abs(flat(ours.state) - flat(ours.cloud.build(LABELS).state())).max() > 1e-3
    assert ours.progress.rounds[-1]["control_norm"] > 0


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_servers_control_is_the_mean_of_the_devices(place: Place, fraction: float) -> None:
    """Weighted by examples, also while some have never taken part."""
    devices = {1: place.device(0, 5), 2: place.device(1, 10), 3: place.device(2, 20)}
    strategy = run(place, "mean", FederatedWire(devices), train__fraction=fraction)
    zeros = {n: np.zeros_like(v) for n, v in strategy.state.items()}
    named = {d.home.device_id: controls(d) or zeros for d in devices.values()}
    sizes = strategy.fleet.train
    assert sorted(sizes.values()) == [4, 8, 16]
    wanted = weighted_mean([named[d] for d in sizes], list(sizes.values()))
    assert np.linalg.norm(flat(wanted)) > 1e-3
    np.testing.assert_allclose(flat(strategy.control), flat(wanted), atol=1e-6)


def test_the_clouds_step(place: Place) -> None:
    devices = {1: place.device(0, 5), 2: place.device(1, 10)}
    whole = run(place, "whole", FederatedWire(devices), train__epochs=1)
    half = run(
        place,
        "half",
        FederatedWire(devices),
        train__epochs=1,
        federated__scaffold_learning_rate=0.5,
    )
    start = flat(whole.cloud.build(LABELS).state())
    np.testing.assert_allclose(
        flat(half.state) - start, 0.5 * (flat(whole.state) - start), atol=1e-6
    )
    # the step is the weights', not the control's
    np.testing.assert_allclose(flat(half.control), flat(whole.control), atol=1e-5)


def test_a_run_killed_in_round_two_goes_on_with_its_control(place: Place) -> None:
    devices = {1: place.device(0, 5), 2: place.device(1, 10)}
    settings = {"train__epochs": 3}
    wire = FederatedWire(devices)

    asked: list[int] = []

    def kill(node: int, message: Message) -> None:
        if message.content.config_records[REQUEST].get("server-round") == 2:
            asked.append(node)
        if len(asked) == 2:
            raise KeyboardInterrupt

    wire.before = cast("Callable[[int, Message], None]", kill)
    with pytest.raises(KeyboardInterrupt):
        run(place, "broken", wire, **settings)
    # one device has made its second step; it gives that answer again
    assert len(set(asked)) == 2
    resumed = run(place, "broken", FederatedWire(devices), **settings)
    after = {node: controls(d) for node, d in devices.items()}
    assert [r["round"] for r in resumed.progress.rounds] == [1, 2, 3]

    whole = run(place, "unbroken", FederatedWire(devices), **settings)
    assert_same(resumed.state, whole.state)
    assert_same(resumed.control, whole.control)
    for node, device in devices.items():
        assert_same(after[node], controls(device))
