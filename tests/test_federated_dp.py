"""Differential privacy of the federated baselines: clips, noise, accounts, and what breaks them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_kit import Device
from federated_kit import (
    FederatedWire,
    Place,
    answer_of,
    ask_fit,
    assert_same,
    flat,
    model_of,
    noise_holds,
)
from opacus.accountants import PRVAccountant
from tiny_models import save_tiny, sentences

from privtune_flwr.config import ConfigError, RunConfig, flatten, load_run_config
from privtune_flwr.data import load_source, tokenise
from privtune_flwr.errors import Refusal, RunError
from privtune_flwr.federated import dp_sgd
from privtune_flwr.federated.dp_optimizer import KeyedDPOptimizer, per_example_gradients
from privtune_flwr.federated.dp_sgd import plan_budget, private_step, train_privately
from privtune_flwr.federated.local import evaluate_locally
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, load_whole, pad
from privtune_flwr.models import resolve_model
from privtune_flwr.privacy.learned_update import norm_of
from privtune_flwr.privacy.learning import State

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PRIVATE = {"federated__example_privacy": "dp-sgd", "train__optimizer": "sgd"}
CENTRAL = {"train__strategy": "dp-fedavg", "federated__update_clip": 0.05}
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("federated-dp"), patch)


@pytest.fixture(scope="module")
def devices(place: Place) -> dict[int, Device]:
    place.cloud()
    return {n: place.device(n, examples) for n, examples in ((1, 10), (2, 10), (3, 20))}


def settings_of(**changes: Any) -> FitSettings:
    dotted = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    base = {"train.strategy": "fedavg", "federated.example-privacy": "dp-sgd"}
    return FitSettings.of(load_run_config(flatten(RunConfig()) | base | dotted))


def work_on(sequences: Any, labels: Any, **changes: Any) -> Work:
    work = Work(sequences, labels, 1, 1, 0.0, 5, {}, None, KEY)
    return replace(work, **changes)


@pytest.fixture(scope="module")
def text() -> tuple[list[Any], list[int]]:
    ids = [np.asarray(s, dtype=np.int32) for s in sentences([4, 7, 5, 3, 7, 6], seed=1)]
    return ids, [0, 1, 1, 0, 1, 0]


def tiny(folder: Path, family: str, **changes: Any) -> WholeModel:
    return load_whole(save_tiny(family, folder / family), settings_of(**changes), ("a", "b"))


def plain_gradients(model: WholeModel, ids: Any, label: int) -> State:
    """One example's gradient without any hooks."""
    model.zero_grad(set_to_none=True)
    logits_BC = model(*pad([ids]))
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits_BC, torch.tensor([label])))
    return {
        n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy()
        for n, p in model.trainable().items()
    }


def without_dropout(model: WholeModel) -> WholeModel:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model.train()


# ------------------------------------------------------------------------- gradients by example


@pytest.mark.parametrize("tuning", ["full", "lora", "prompt"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_each_example_has_its_own_gradient(
    family: str, tuning: str, text: Any, tmp_path: Path
) -> None:
    model = without_dropout(tiny(tmp_path, family, model__tuning=tuning))
    ids, labels = text
    with per_example_gradients(model):
        logits_BC = model(*pad(ids))
        loss = torch.nn.functional.cross_entropy(logits_BC, torch.tensor(labels), reduction="sum")
        torch.autograd.backward(loss)
        found = {n: p.grad_sample.numpy().copy() for n, p in model.trainable().items()}
    for i, (sentence, label) in enumerate(zip(ids, labels, strict=True)):
        for name, gradient in plain_gradients(model, sentence, label).items():
            # rtol: one entry is a sum in another order, and a prompt's is as large as 20
            np.testing.assert_allclose(found[name][i], gradient, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("tuning", ["full", "lora", "prompt"])
def test_the_model_is_clean_afterwards_even_after_a_fault(
    tuning: str, text: Any, tmp_path: Path
) -> None:
    model = tiny(tmp_path, "bert", model__tuning=tuning)
    modules = {n: set(vars(m)) for n, m in model.named_modules()}
    parameters = {n: set(vars(p)) for n, p in model.named_parameters()}
    train_privately(model, work_on(*text), epochs=1, progress=(0.0, 1.0))
    with pytest.raises(IndexError):  # a label that is no class
        train_privately(model, work_on(text[0], [7] * 6), epochs=4, progress=(0.0, 1.0))
    for name, module in model.named_modules():
        assert set(vars(module)) == modules[name], name
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(hooks), name
    for name, parameter in model.named_parameters():
        assert set(vars(parameter)) == parameters[name], name
        assert parameter.grad is None, name


# ------------------------------------------------------------------------------- clip and noise


def one_update(
    model: WholeModel, work: Work, batch: list[int], noise: float, clip: float, key: bytes = KEY
) -> State:
    """What one step of plain SGD at rate 1 subtracts: the noisy, clipped sum (batch size 1)."""
    before = model.state()
    with per_example_gradients(model):
        groups = [{"params": list(model.trainable().values()), "lr": 1.0}]
        optimizer = KeyedDPOptimizer(
            torch.optim.SGD(groups),
            noise_multiplier=noise,
            max_grad_norm=clip,
            expected_batch_size=1.0,
            rng=dp_sgd.keyed_generator(key, "test"),
        )
        private_step(model, optimizer, work, batch)
    after = model.state()
    model.load(before)
    return {n: before[n] - after[n] for n in before}


def test_no_example_moves_the_model_by_more_than_the_clip(text: Any, tmp_path: Path) -> None:
    model = without_dropout(tiny(tmp_path, "bert", model__tuning="lora"))
    work = work_on(*text)
    for i in range(3):
        whole = norm_of(plain_gradients(model, text[0][i], text[1][i]))
        clip = whole / 7
        assert norm_of(one_update(model, work, [i], 0.0, clip)) == pytest.approx(clip, rel=1e-3)
        # a gradient below the clip stays as it is
        assert norm_of(one_update(model, work, [i], 0.0, 9 * whole)) == pytest.approx(whole, 1e-3)
    # each is clipped for itself before the sum: two that point the same way move twice the clip
    twice = one_update(model, work, [0, 0], 0.0, 1e-3)
    assert norm_of(twice) == pytest.approx(2e-3, rel=1e-2)


def test_pieces_of_a_batch_add_up_to_it(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_dropout(tiny(tmp_path, "bert", model__tuning="lora"))
    work = work_on(*text)
    whole = one_update(model, work, [0, 1, 2, 3, 4], 0.5, 0.1)
    monkeypatch.setattr(dp_sgd, "_GRADIENT_NUMBERS", 1)
    apart = one_update(model, work, [0, 1, 2, 3, 4], 0.5, 0.1)
    np.testing.assert_allclose(flat(whole), flat(apart), atol=1e-6)


def test_an_example_whose_gradient_is_not_a_number_is_bounded_too(
    text: Any, tmp_path: Path
) -> None:
    model = without_dropout(tiny(tmp_path, "bert", model__tuning="lora"))
    # a state that makes every gradient of the sentences overflow
    big = {n: v * np.float32(1e30) for n, v in model.state().items()}
    model.load(big)
    update = one_update(model, work_on(*text), [0, 1], 0.0, 1.0)
    assert all(np.isfinite(v).all() for v in update.values())


def test_the_noise_in_the_sum_is_the_multiplier_times_the_clip(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = without_dropout(tiny(tmp_path, "bert", model__tuning="full"))
    work = work_on(*text)
    clean = one_update(model, work, [0, 1, 2], 0.0, 0.5)

    def drawn(batch: list[int]) -> State:
        noisy = one_update(model, work, batch, 3.0, 0.5)
        return {n: noisy[n] - (clean[n] if batch else 0) for n in noisy}

    assert noise_holds(drawn([0, 1, 2]), 1.5)
    # a step in which nobody was drawn looks the same
    assert noise_holds(drawn([]), 1.5)
    # the test notices a sampler that is off, or that forgot the clip or the square
    assert not noise_holds(drawn([]), 3.0)
    assert not noise_holds(drawn([]), 1.5**2)

    class Silent:
        def standard_normal(self, shape: Any) -> Any:
            return np.zeros(shape)

    monkeypatch.setattr(dp_sgd, "keyed_generator", lambda *parts: Silent())
    assert not noise_holds(drawn([]), 1.5)


def test_noise_belongs_to_the_key(text: Any, tmp_path: Path) -> None:
    model = without_dropout(tiny(tmp_path, "bert", model__tuning="full"))
    work = work_on(*text)
    one, again, other = (
        one_update(model, work, [], 1.0, 1.0, key) for key in (KEY, KEY, KEY[::-1])
    )
    assert_same(one, again)
    size = flat(one).size
    assert abs(np.corrcoef(flat(one), flat(other))[0, 1]) < 5 / np.sqrt(size)
    with pytest.raises(ValueError, match="32 bytes"):
        train_privately(model, replace(work, noise_key=b""), epochs=1, progress=(0.0, 1.0))


def test_poisson_samples_have_the_planned_rate(
    text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []
    monkeypatch.setattr(dp_sgd, "private_step", lambda m, o, w, b: (drawn.append(b), (0.0, 0))[1])
    model = tiny(tmp_path, "bert", model__tuning="lora", train__batch_size=2)
    work = work_on(text[0] * 4, text[1] * 4)
    train_privately(model, work, epochs=50, progress=(0.0, 1.0))
    assert len(drawn) == 50 * 12
    sizes = np.array([len(b) for b in drawn])
    # binomial of 24 at 1/12: a shuffled batch would always hold 2
    assert sizes.mean() == pytest.approx(2, abs=5 * np.sqrt(24 / 12 * 11 / 12 / sizes.size))
    assert sizes.var() == pytest.approx(24 / 12 * 11 / 12, rel=0.3)


def test_the_proximal_term_pulls_without_spending(text: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"train__optimizer": "sgd", "train__learning_rate": 0.05}
    model = tiny(tmp_path, "bert", model__tuning="lora", train__schedule="constant", **changes)
    start = model.state()
    moved, spent = [], []
    for mu in (0.0, 10.0):
        model.load(start)
        work = work_on(*text, proximal_mu=mu)
        _, told = train_privately(model, work, epochs=8, progress=(0.0, 1.0))
        moved.append(norm_of({n: v - start[n] for n, v in model.state().items()}))
        spent.append(told["epsilon"])
    assert moved[1] < 0.9 * moved[0]
    assert spent[0] == spent[1]


# ------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize(
    ("examples", "batch", "passes", "epsilon"),
    [(100, 8, 3, 8.0), (100, 8, 3, 1.0), (40, 32, 10, 0.1), (5, 32, 3, 4.0)],
)
def test_the_whole_run_costs_what_was_asked(
    examples: int, batch: int, passes: int, epsilon: float
) -> None:
    budget = plan_budget(
        examples=examples, batch_size=batch, passes=passes, epsilon=epsilon, delta=1e-5
    )
    assert 0.9 * epsilon < budget.epsilon() <= epsilon
    # rounds add up to it; a third of the passes costs less, but more than a third
    assert epsilon / passes / 2 < budget.epsilon(1) < budget.epsilon()
    if epsilon < 1:
        return  # minutes, for the other accountant
    # it composes numerically: the bound holds and is not loose
    tight = PRVAccountant()
    tight.history = [(budget.noise_multiplier, budget.sample_rate, passes * -(-examples // batch))]
    assert 0.7 * epsilon < tight.get_epsilon(1e-5, eps_error=0.02 * epsilon) <= epsilon


def test_more_passes_need_more_noise_and_an_impossible_epsilon_is_refused() -> None:
    def noise(passes: int, epsilon: float) -> float:
        plan = plan_budget(examples=50, batch_size=10, passes=passes, epsilon=epsilon, delta=1e-5)
        return plan.noise_multiplier

    assert noise(1, 2.0) < noise(4, 2.0) < noise(4, 1.0)
    with pytest.raises(Refusal, match=r"federated\.epsilon = 0\.0001"):
        noise(1, 1e-4)


# ----------------------------------------------------------------------------------- the device


def test_rounds_tell_the_epsilon_spent_so_far(place: Place, devices: dict[int, Device]) -> None:
    wire = FederatedWire(devices)
    run = place.run("dp-sgd", wire, **PRIVATE, federated__epsilon=6.0)
    first, second = run.progress.rounds
    assert 0 < first["epsilon"] < second["epsilon"] <= 6.0
    assert second["epsilon"] > 0.9 * 6.0
    assert first["delta"] == second["delta"] == 1e-5
    assert "loss_sum" not in first
    told = run.guarantee()
    assert told["epsilon"] == 6.0
    assert "each training example" in told["statement"]
    spent = devices[1].home.fit_ledger.spent()
    assert (spent.fits, spent.epsilon, spent.delta) == (2, 6.0, 1e-5)


def test_a_retry_has_the_same_bytes_and_another_device_other_noise(
    place: Place, devices: dict[int, Device]
) -> None:
    cloud = place.cloud(**PRIVATE, run__seed=2)
    state = model_of(cloud).state()
    device = devices[1]
    one = answer_of(ask_fit(device, cloud, state))
    assert_same(one, answer_of(ask_fit(device, cloud, state)))
    # nothing kept: what is computed anew has the same batches, dropout and noise
    (device.home.root / "fit-kept.safetensors").unlink()
    again = answer_of(ask_fit(device, cloud, state))
    np.testing.assert_allclose(flat(one), flat(again), atol=1e-6)
    other = answer_of(ask_fit(devices[2], cloud, state))
    change, another = flat(one) - flat(state), flat(other) - flat(state)
    assert abs(np.corrcoef(change, another)[0, 1]) < 0.2


def test_a_run_gets_one_answer_a_round(place: Place, devices: dict[int, Device]) -> None:
    cloud = place.cloud(**PRIVATE, run__seed=3)
    state = model_of(cloud).state()
    other = {n: v + np.float32(0.01) for n, v in state.items()}
    device = devices[1]
    answer_of(ask_fit(device, cloud, state))
    for number, sent in ((1, other), (3, state)):
        refused = ask_fit(device, cloud, sent, flower={"server-round": number})
        assert "request.round" in str(refused.error)
    answer_of(ask_fit(device, cloud, other, flower={"server-round": 2}))
    # the first round's answer is kept no more, and is not drawn again
    assert "request.round" in str(ask_fit(device, cloud, state).error)


def test_a_delta_that_means_nothing_counts_as_no_epsilon(place: Place) -> None:
    careful = place.device(9, 10, max_fit_epsilon=10.0)
    for delta, usable in ((1e-5, True), (0.5, False)):
        cloud = place.cloud(**PRIVATE, federated__delta=delta, run__seed=4)
        reply = ask_fit(careful, cloud, model_of(cloud).state())
        assert reply.has_content() is usable
        if not usable:
            assert "max-fit-epsilon" in str(reply.error)


def test_a_device_without_opacus_says_what_it_needs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = FederatedWire({1: place.device(11, 10)})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "opacus", None)
        with pytest.raises(RunError, match=r"pip install 'privtune-flwr\[dp\]'"):
            place.run("no-opacus", wire, **PRIVATE)


@pytest.mark.parametrize("strategy", ["scaffold", "bbt", "distil", "central", "local", "split"])
def test_dp_sgd_is_refused_where_nothing_would_do_it(strategy: str) -> None:
    asked = {
        "train.strategy": strategy,
        "federated.example-privacy": "dp-sgd",
        "train.optimizer": "sgd",
    }
    with pytest.raises(ConfigError, match=r"federated\.example-privacy.*does not protect"):
        load_run_config(flatten(RunConfig()) | asked)
    # the device does not take the cloud's word
    forged = settings_of().to_json().replace('"fedavg"', f'"{strategy}"')
    with pytest.raises(Refusal, match=r"request\.settings"):
        FitSettings.from_json(forged)


# ------------------------------------------------------------------------------------ real weights


def test_minilm_with_lora_trains_privately() -> None:
    settings = settings_of(
        model__tuning="lora",
        train__batch_size=8,
        train__learning_rate=2e-3,
        train__head_learning_rate=5e-3,
        train__schedule="constant",
        train__warmup=0.0,
        federated__epsilon=200.0,
    )
    model = load_whole(resolve_model("minilm"), settings, ("neg", "pos"))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    data = load_source("movie-snippets").select(range(0, 4000, 125))
    ids = tokenise(model.parts.tokenizer, list(data["text"]), 32)
    labels = [int(v) for v in data["label"]]
    before = evaluate_locally(model, ids, labels)[1]
    result, told = train_privately(model, work_on(ids, labels), epochs=3, progress=(0.0, 1.0))
    assert evaluate_locally(model, ids, labels)[1] < 0.9 * before
    assert result.steps == 12
    assert 180 < told["epsilon"] <= 200
    for name, value in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
