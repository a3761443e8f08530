"""Black-box prompt tuning: the search, what devices answer, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
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
    model_of,
)
from flwr.app import Array, Error, Message
from safetensors.numpy import load_file
from scipy.special import log_softmax

from privtune_flwr import server_app
from privtune_flwr.config import ConfigError, RunConfig, flatten, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device.holdings import shared_part
from privtune_flwr.errors import Refusal, RunError
from privtune_flwr.federated.blackbox import (
    CANDIDATES,
    LOSSES,
    POINT,
    START_SCALE,
    BlackBoxMethod,
    BlackBoxModel,
    draw_projection,
    width,
)
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.prompt_files import PROMPT_FILE, save_prompt
from privtune_flwr.federated.search import Search
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import load_whole
from privtune_flwr.models import resolve_model
from privtune_flwr.protocol import METRICS
from privtune_flwr.protocol.fit import ANSWER, FIT_METRICS, TEXT_METRICS
from privtune_flwr.protocol.requests import PAYLOAD
from privtune_flwr.training.trainer import accuracy_and_loss
from strategies.blackbox import BlackBoxTuning

pytestmark = pytest.mark.usefixtures("one_torch_thread")

POPULATION, INTRINSIC, GENERATIONS = 6, 5, 4
WIDTH = INTRINSIC + 1 + len(LABELS)
BBT: dict[str, Any] = {
    "train__strategy": "bbt",
    "federated__population": POPULATION,
    "federated__intrinsic": INTRINSIC,
    "federated__generations": GENERATIONS,
    "federated__bbt_examples": 8,
    "federated__prompt_tokens": 3,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("blackbox"), patch)


@pytest.fixture(scope="module")
def devices(place: Place) -> dict[int, Device]:
    """Two devices, of 8 and 32 training examples."""
    place.cloud(**BBT)
    return {1: place.device(1, 10), 2: place.device(2, 40)}


def candidates(seed: int = 0, *, count: int = POPULATION, size: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, (count, size)).astype(np.float32)


def started(place: Place, name: str, wire: FederatedWire, **changes: Any) -> BlackBoxTuning:
    return cast("BlackBoxTuning", place.run(name, wire, **BBT | changes))


def test_the_projection_is_a_function_of_the_seed(place: Place) -> None:
    one, same, other = (draw_projection(seed, 400, 9) for seed in (5, 5, 6))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    # variance of a prompt's number is that of a number of z
    assert np.sqrt((one**2).sum(axis=1)).mean() == pytest.approx(1.0, abs=0.1)
    cloud = place.cloud(**BBT)
    at_cloud = cloud.build(LABELS)
    on_device = model_of(cloud, FitSettings.from_json(cloud.settings.to_json()))
    point = {POINT: candidates(3)[0]}
    at_cloud.load(point)
    on_device.load(point)
    assert_same(at_cloud.beside(), on_device.beside())


def test_a_first_step_spreads_as_embeddings_do(place: Place) -> None:
    cloud = place.cloud(**BBT | {"federated__intrinsic": 200, "federated__prompt_tokens": 8})
    model = cloud.build(LABELS)
    assert isinstance(model, BlackBoxModel)
    with torch.no_grad():
        ids = torch.arange(int(model.bottom.base.config.vocab_size))[None]
        ids = torch.cat([ids[:, :32], ids[:, -32:]])
        rows_ND = model.bottom(ids, torch.ones_like(ids)).flatten(0, 1)
    point = np.zeros(200 + 3, dtype=np.float32)
    point[:200] = np.random.default_rng(1).normal(0, cloud.settings.federated.sigma, 200)
    start = model.beside()["prompt"]
    model.load({POINT: point})
    step = model.beside()["prompt"] - start
    assert step.std() == pytest.approx(float((rows_ND - rows_ND.mean(0)).std()), rel=0.25)


def test_the_head_is_a_cosine_with_class_names(place: Place) -> None:
    model = place.cloud(**BBT).build(LABELS)
    assert isinstance(model, BlackBoxModel)
    ids = tokenise(model.parts.tokenizer, ["w3 w4 w9", "w40 w41"], 16)
    point = np.zeros(WIDTH, dtype=np.float32)
    plain = model.logits(ids)
    point[INTRINSIC:] = [np.log(2), 0.25, -1.0]
    model.load({POINT: point})
    assert np.abs(plain).max() <= START_SCALE * (1 + 1e-6)
    np.testing.assert_allclose(model.logits(ids), 2 * plain + [0.25, -1.0], atol=1e-4)
    assert model.trainable() == {}


def test_losses_are_those_of_the_candidates(place: Place) -> None:
    cloud = place.cloud(**BBT)
    model = model_of(cloud)
    tokenizer = model.parts.tokenizer
    texts = [f"w{i} w{i + 2} w{3 * i}" for i in range(12)]
    ids, labels = tokenise(tokenizer, texts, 16), [i % 2 for i in range(12)]
    seen: list[int] = []

    def counting(sequences: Any) -> Any:
        seen.append(len(sequences))
        return BlackBoxModel.logits(model, sequences)  # type: ignore[arg-type]

    method = BlackBoxMethod(cloud.settings, cloud.model_bundle[1].resolve(), LABELS)
    assert method.model is model
    model.logits = counting  # type: ignore[method-assign]
    asked = candidates()
    work = Work(ids, labels, 1, GENERATIONS, 0.0, 99, {})
    outcome = method.fit({CANDIDATES: asked}, work)
    del model.logits
    assert seen == [8] * POPULATION
    assert set(outcome.arrays) == {LOSSES}
    assert not outcome.metrics
    assert not outcome.memory
    # by hand, on the same draw
    chosen = sorted(np.random.default_rng(99).choice(12, size=8, replace=False))
    for point, loss in zip(asked, outcome.arrays[LOSSES], strict=True):
        model.load({POINT: point})
        log_BC = log_softmax(model.logits([ids[i] for i in chosen]).astype(np.float64), axis=1)
        by_hand = -np.mean([log_BC[n, labels[i]] for n, i in enumerate(chosen)])
        assert loss == pytest.approx(by_hand, rel=1e-5)
    assert len(set(outcome.arrays[LOSSES].tolist())) == POPULATION


def test_the_cloud_weighs_losses_by_examples(place: Place, devices: dict[int, Device]) -> None:
    wire = FederatedWire(devices)
    answers: list[tuple[float, np.ndarray]] = []

    def keep(node: int, reply: Message) -> Message:
        if reply.has_content() and ANSWER in reply.content:
            weight = float(reply.content.metric_records[METRICS]["weight"])  # type: ignore[arg-type]
            answers.append((weight, answer_of(reply)[LOSSES]))
            # nothing but losses leaves, and no sum over the text beside them
            assert set(reply.content.array_records[ANSWER]) == {LOSSES}
            assert not set(reply.content.metric_records[METRICS]) & set(TEXT_METRICS)
            assert set(reply.content.metric_records[METRICS]) <= set(FIT_METRICS)
        return reply

    wire.after = keep
    told: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        tell = Search.tell
        patch.setattr(Search, "tell", lambda s, losses: (told.append(losses), tell(s, losses))[1])
        strategy = started(place, "weights", wire)
    assert len(told) == len(strategy.progress.rounds) == GENERATIONS
    assert sorted({weight for weight, _ in answers}) == [8.0, 32.0]
    for generation, losses in enumerate(told):
        pair = answers[2 * generation : 2 * generation + 2]
        wanted = sum(w * v for w, v in pair) / sum(w for w, _ in pair)
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert strategy.progress.rounds[-1]["loss"] == pytest.approx(float(told[-1].mean()))
    # what is tested is the favourite
    np.testing.assert_array_equal(strategy.state[POINT], strategy.search.mean())
    np.testing.assert_array_equal(strategy.model.state()[POINT], strategy.search.mean())
    save_prompt(strategy.model, strategy.folder.path)
    saved = load_file(strategy.folder.path / PROMPT_FILE)
    assert {n: v.shape for n, v in saved.items()} == {
        "prompt": (3, 32),
        "classes": (2, 32),
        "scale": (1,),
        "bias": (2,),
    }
    assert "must not be used" in (strategy.folder.path / "PROMPT.md").read_text()


@pytest.mark.parametrize(
    "state",
    [
        {CANDIDATES: np.full((POPULATION, WIDTH), np.nan, dtype=np.float32)},
        {CANDIDATES: np.full((POPULATION, WIDTH), 2e3, dtype=np.float32)},
        {CANDIDATES: candidates(size=WIDTH + 1)},
        {CANDIDATES: candidates(count=POPULATION + 1)},
        {CANDIDATES: candidates()[0]},
        {"others": candidates()},
        {CANDIDATES: candidates(), "others": candidates()},
    ],
)
def test_hostile_candidates_are_refused(
    place: Place, devices: dict[int, Device], state: dict[str, np.ndarray]
) -> None:
    reply = ask_fit(devices[1], place.cloud(**BBT), state)
    assert reply.has_error()
    assert "request.state" in reply.error.reason


def test_a_loss_over_few_examples_does_not_leave(place: Place) -> None:
    device = place.device(7, 10, min_metric_examples=9)
    reply = ask_fit(device, place.cloud(**BBT), {CANDIDATES: candidates()})
    assert "policy.min-metric-examples" in reply.error.reason
    device = place.device(8, 40, min_metric_examples=9)
    reply = ask_fit(device, place.cloud(**BBT), {CANDIDATES: candidates()})
    assert "policy.min-metric-examples" in reply.error.reason


def test_a_projection_that_no_device_can_hold_is_refused(place: Place) -> None:
    huge = BBT | {"federated__intrinsic": 10_000, "federated__prompt_tokens": 256}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("privtune_flwr.federated.blackbox._MAX_PROJECTION", 10**6)
        with pytest.raises(Refusal, match=r"federated\.intrinsic"):
            place.cloud(**huge).build(LABELS)


@pytest.mark.parametrize("loss", [-0.5, 1e6])
def test_losses_that_cannot_be_are_quarantined(
    place: Place, devices: dict[int, Device], loss: float
) -> None:
    wire = FederatedWire(devices)

    def lie(node: int, reply: Message) -> Message:
        if node == 1 and reply.has_content() and ANSWER in reply.content:
            value = np.full(POPULATION, loss, dtype=np.float32)
            reply.content.array_records[ANSWER][LOSSES] = Array(value)
        return reply

    wire.after = lie
    strategy = started(place, f"lie{loss}", wire)
    assert list(strategy.progress.quarantined) == [devices[1].home.device_id]
    assert [r["devices"] for r in strategy.progress.rounds] == [1] * GENERATIONS


def test_a_resumed_run_asks_for_the_same_candidates(
    place: Place, devices: dict[int, Device]
) -> None:
    whole = started(place, "whole", FederatedWire(devices))
    first = started(place, "parts", FederatedWire(devices), federated__generations=2)
    kept = first.kept()
    # settings name the run's length, so the same ones are taken up again
    strategy = cast("BlackBoxTuning", place.strategy("parts", **BBT))
    strategy.start(FederatedWire(devices))  # type: ignore[arg-type]
    assert strategy.progress.rounds[0]["loss"] == first.progress.rounds[0]["loss"]
    assert len(strategy.progress.rounds) == GENERATIONS
    fresh = Search(WIDTH, population=POPULATION, sigma=0.5, seed=0)
    assert not np.allclose(fresh.candidates(), first.search.candidates())
    fresh.restore(kept)
    np.testing.assert_array_equal(fresh.candidates(), first.search.candidates())
    np.testing.assert_array_equal(fresh.mean(), first.search.mean())
    # draws of a device are keyed by the settings too: losses differ, the way they are told does not
    assert whole.kept()["told"].shape == strategy.kept()["told"].shape == (GENERATIONS, POPULATION)


def test_another_library_is_noticed() -> None:
    search = Search(4, population=5, sigma=0.5, seed=1)
    search.tell(np.arange(5, dtype=np.float32))
    kept = search.kept()
    kept["last"] = kept["last"] + np.float32(0.01)
    with pytest.raises(RunError, match="cma and numpy"):
        Search(4, population=5, sigma=0.5, seed=1).restore(kept)


def test_the_search_leaves_the_global_generator_alone() -> None:
    np.random.seed(3)
    wanted = np.random.rand(3)
    np.random.seed(3)
    one = Search(4, population=5, sigma=0.5, seed=1)
    asked = one.candidates()
    np.testing.assert_array_equal(asked, one.candidates())
    np.testing.assert_array_equal(np.random.rand(3), wanted)
    other = Search(4, population=5, sigma=0.5, seed=2)
    assert not np.array_equal(asked, other.candidates())


def test_a_generation_without_answers_is_asked_again(
    place: Place, devices: dict[int, Device]
) -> None:
    wire = FederatedWire({1: devices[1]})
    asked: list[np.ndarray] = []
    lost = [True]

    def note(node: int, message: Message) -> None:
        if CANDIDATES in message.content.array_records.get(PAYLOAD, {}):
            asked.append(message.content.array_records[PAYLOAD][CANDIDATES].numpy())

    def lose(node: int, reply: Message) -> Message:
        if reply.has_content() and ANSWER in reply.content and lost[0]:
            lost[0] = len(asked) < 2
            return Message(error=Error(0, "lost"), reply_to=None, metadata=reply.metadata)  # type: ignore[call-overload]
        return reply

    wire.before, wire.after = note, lose
    strategy = started(place, "lost", wire, train__retries=1)
    assert strategy.progress.rounds[0]["devices"] == 0
    np.testing.assert_array_equal(asked[0], asked[2])
    assert not np.array_equal(asked[2], asked[3])


def test_without_cma_the_run_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_run_config(flatten(RunConfig()) | {"train.strategy": "bbt"})
    server_app._check_extras(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"privtune-flwr\[blackbox\]"):
        server_app._check_extras(config)


def test_rounds_are_generations() -> None:
    flat = flatten(RunConfig()) | {"train.strategy": "bbt", "federated.generations": 7}
    assert FitSettings.of(load_run_config(flat)).rounds == 7
    assert FitSettings.of(load_run_config(flat | {"train.strategy": "fedavg"})).rounds == 3


def test_the_search_lowers_the_loss_on_real_text() -> None:
    config = load_run_config(
        flatten(RunConfig())
        | {
            "train.strategy": "bbt",
            "federated.intrinsic": 8,
            "federated.population": 6,
            "federated.bbt-examples": 24,
            "data.train-examples": 200,
        }
    )
    settings = FitSettings.of(config)
    part = shared_part(config.data, 0, 0, 1).train
    labels_all = part.features["label"].names
    found = sorted(zip(part["text"], part["label"], strict=True), key=lambda e: len(e[0]))[:24]
    model = load_whole(resolve_model("minilm"), settings, labels_all)
    ids = tokenise(model.parts.tokenizer, [text for text, _ in found], 24)
    labels = [int(label) for _, label in found]
    search = Search(width(settings, 2), population=6, sigma=0.5, seed=0)
    before = accuracy_and_loss(model.logits(ids), labels)[1]
    for _ in range(8):
        losses = []
        for point in search.candidates():
            model.load({POINT: point})
            losses.append(accuracy_and_loss(model.logits(ids), labels)[1])
        search.tell(np.array(losses, dtype=np.float32))
    model.load({POINT: search.mean()})
    assert accuracy_and_loss(model.logits(ids), labels)[1] < before - 0.01
