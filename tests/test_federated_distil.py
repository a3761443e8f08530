"""Federated distillation: what is taught, what stays on a device, and what may leave it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from device_kit import RUN_ID, Device, wire_bytes_of
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from learned_kit import Wire, run_folder
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tiny_models import one_thread

from privtune_flwr.bundle import BundleCache
from privtune_flwr.config import ConfigError, RunConfig, flatten, load_run_config
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.cloud import FederatedCloud, prepare_federated
from privtune_flwr.federated.distil import (
    LOGITS,
    NO_TEACHER,
    PUBLIC_FILE,
    TEACHER,
    DistilMethod,
    _first_state,
    distil,
    distillation_loss,
    public_bundle,
    read_public,
    vote_of,
)
from privtune_flwr.federated.methods import Outcome, Work
from privtune_flwr.federated.whole import held_whole
from privtune_flwr.privacy.learning import State
from privtune_flwr.protocol.fit import ANSWER, FIT, FIT_HEADER, FitRequest
from privtune_flwr.protocol.replies import METRICS
from privtune_flwr.protocol.requests import PAYLOAD, REQUEST
from privtune_flwr.protocol.updates import state_record
from strategies.distil import DistilTuning

PUBLIC = 16
LABELS = ("negative", "positive")
# sizes differ from device to device, so that a mean without weights would be another
RUN = {
    "train.strategy": "distil",
    "train.epochs": 2,
    "train.learning-rate": 1e-3,
    "train.batch-size": 8,
    "model.tuning": "lora",
    "model.max-length": 16,
    "federated.public-examples": PUBLIC,
    "data.train-examples": 40,
    "data.eval-examples": 20,
    "data.test-examples": 10,
    "data.partitioner": "size",
}
POLICY = {"policy-fit-rounds": 1000, "policy-min-metric-examples": 1}
BEGIN: State = {NO_TEACHER: np.zeros(1, np.float32)}


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(flatten(RunConfig()) | RUN)


@pytest.fixture(scope="module")
def cloud(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FederatedCloud]:
    bundles = BundleCache(tmp_path_factory.mktemp("bundles"))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("cloud", "distil"):
            patch.setattr(f"privtune_flwr.federated.{module}.cloud_cache", lambda: bundles)
        # who sends a message: Flower sets it where a server app runs
        for name in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, name, 1)
        # devices share a disk here: one loaded model serves all of them
        for where, load in (
            ("methods.held_whole", held_whole),
            ("distil._first_state", _first_state),
        ):
            patch.setattr(
                f"privtune_flwr.federated.{where}",
                lambda folder, *rest, load=load: load(folder.resolve(), *rest),
            )
        yield prepare_federated(config)


@pytest.fixture(scope="module")
def method(cloud: FederatedCloud) -> DistilMethod:
    return DistilMethod(cloud.settings, cloud.model_bundle[1], LABELS)


@pytest.fixture(scope="module")
def public(cloud: FederatedCloud, method: DistilMethod) -> list[NDArray[np.int32]]:
    return read_public(folder_of(cloud), cloud.settings, method.model.bottom)


@pytest.fixture
def make(cloud: FederatedCloud, tmp_path: Path) -> Callable[..., Device]:
    def build(partition: int, **node_config: Any) -> Device:
        root = cloud.model_bundle[1].parent
        node = POLICY | {"partition-id": partition, "num-partitions": 4} | node_config
        home = tmp_path / f"device-{partition}"
        return Device(home, root, cloud.model_id, node, dict(RUN))

    return build


def folder_of(cloud: FederatedCloud) -> Path:
    assert cloud.public_bundle is not None
    return cloud.public_bundle[1]


def work_of(public: list[NDArray[np.int32]], folder: Path, **changes: Any) -> Work:
    """A device's round on sentences whose labels are the parity of a token: there is no text."""
    sequences = public[:10]
    labels = [int(s[1]) % 2 for s in sequences]
    return dataclasses.replace(Work(sequences, labels, 1, 2, 0.0, 7, {}, folder), **changes)


def ask(
    device: Device, cloud: FederatedCloud, state: State, number: int = 1, **changes: Any
) -> Message:
    request = FitRequest(
        run_id=RUN_ID,
        model_id=cloud.model_id,
        settings=cloud.settings.to_json(),
        public_id=changes.get("public_id", cloud.public_id),
        labels="\n".join(device.holdings.label_names),
    ).to_record()
    request["server-round"] = number
    return device.send(RecordDict({REQUEST: request, PAYLOAD: state_record(state)}), FIT)


def logits_of(reply: Message) -> NDArray[Any]:
    assert reply.has_content(), reply.error
    assert set(reply.content.array_records[ANSWER]) == {LOGITS}
    return reply.content.array_records[ANSWER][LOGITS].numpy()


def any_teacher(size: int = PUBLIC, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (size, 2)).astype(np.float32)


# -------------------------------------------------------------------------------------- algebra


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_the_gradient_is_temperature_times_the_difference_of_softened_outputs(
    temperature: float,
) -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(5, 3, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(5, 3, generator=draw, dtype=torch.float64)
    loss = distillation_loss(student, teacher, temperature)
    torch.autograd.backward(loss)
    soft_student = torch.softmax(student.detach() / temperature, 1)
    soft_teacher = torch.softmax(teacher / temperature, 1)
    by_hand = temperature * (soft_student - soft_teacher) / 5
    assert student.grad is not None
    torch.testing.assert_close(student.grad, by_hand)
    divergence = (soft_teacher * (soft_teacher / soft_student).log()).sum() / 5
    torch.testing.assert_close(loss.detach(), temperature**2 * divergence)


def test_the_gradient_keeps_its_size_when_everything_gets_softer() -> None:
    student, teacher = torch.zeros(4, 2, requires_grad=True), torch.tensor([[1.0, -1.0]] * 4)
    norms = []
    for temperature in (20.0, 40.0):
        (grad,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
        norms.append(float(grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_a_vote_keeps_the_probabilities_and_is_bounded() -> None:
    logits = any_teacher() + 5
    vote = vote_of(logits)
    np.testing.assert_allclose(vote.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(
        torch.softmax(torch.from_numpy(vote), 1), torch.softmax(torch.from_numpy(logits), 1), 1e-4
    )
    # the largest numbers that float32 has
    assert vote_of(np.array([[3e38, -3e38, 0]], np.float32)).tolist() == [[20, -20, 0]]


def test_distilling_pulls_a_real_model_towards_its_teacher(
    cloud: FederatedCloud, public: list[NDArray[np.int32]]
) -> None:
    model = cloud.build(LABELS)
    start = model.state()
    teacher = np.tile(np.array([2.0, -2.0], np.float32), (PUBLIC, 1))

    def distance(wanted: NDArray[np.float32]) -> float:
        student = torch.from_numpy(model.logits(public))
        return float(distillation_loss(student, torch.from_numpy(wanted), 2.0))

    before, opposite = distance(teacher), distance(-teacher)
    steps, loss = distil(model, public, teacher, seed=0)
    assert steps == -(-PUBLIC // 8) * cloud.settings.federated.distil_epochs
    # three steps: a small way, but surely that way
    assert distance(teacher) < 0.97 * before
    assert distance(-teacher) > 1.03 * opposite
    assert distance(teacher) < loss < before
    ends = []
    for _ in range(2):
        model.load(start)
        distil(model, public, teacher, seed=0)
        ends.append(model.logits(public).tobytes())
    assert ends[0] == ends[1]


# ------------------------------------------------------------------------------ the public text


def test_the_public_set_is_drawn_by_the_seed_and_holds_no_text(
    cloud: FederatedCloud, config: RunConfig, public: list[NDArray[np.int32]]
) -> None:
    assert [p.name for p in folder_of(cloud).iterdir()] == [PUBLIC_FILE]
    assert len(public) == PUBLIC
    assert cloud.public_bundle is not None
    same = public_bundle(config, cloud.model_bundle[1])
    assert same[0].id == cloud.public_id
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    assert public_bundle(other, cloud.model_bundle[1])[0].id != cloud.public_id
    greedy = config.federated.model_copy(update={"public_examples": 10**6})
    with pytest.raises(ConfigError, match=r"federated\.public-examples = 1000000"):
        public_bundle(config.model_copy(update={"federated": greedy}), cloud.model_bundle[1])


def _hostile(ids: Any, lengths: Any, **more: Any) -> dict[str, NDArray[Any]]:
    return {"ids": np.asarray(ids, np.int32), "lengths": np.asarray(lengths, np.int32), **more}


HOSTILE: dict[str, tuple[Any, str]] = {
    "beyond": (_hostile([30522] * PUBLIC, [1] * PUBLIC), "an id is not in the vocabulary"),
    "negative": (_hostile([-1] * PUBLIC, [1] * PUBLIC), "an id is not in the vocabulary"),
    "sum": (_hostile([5] * 17, [1] * PUBLIC), "do not add up"),
    "overflow": (
        _hostile([5] * PUBLIC, [1] * 14 + [2**31 - 1, -(2**31) + 3]),
        "a length is not between",
    ),
    "empty": (_hostile([5] * PUBLIC, [0, 2] + [1] * 14), "a length is not between"),
    "long": (_hostile([5] * 32, [17] + [1] * 15), "a length is not between 1 and 16"),
    "few": (_hostile([5], [1]), "1 sentences, settings say 16"),
    "none": (_hostile([], []), "0 sentences"),
    "type": (
        {"ids": np.ones(PUBLIC, np.float32), "lengths": np.ones(PUBLIC, np.int32)},
        "ids must be int32",
    ),
    "axes": (_hostile([[5]] * PUBLIC, [1] * PUBLIC), "ids must be int32 with one axis"),
    "more": (_hostile([5] * PUBLIC, [1] * PUBLIC, more=np.zeros(1)), "its arrays are not"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_public_set_is_refused(
    case: str, cloud: FederatedCloud, method: DistilMethod, tmp_path: Path
) -> None:
    arrays, reason = HOSTILE[case]
    save_file(arrays, tmp_path / PUBLIC_FILE)
    with pytest.raises(Refusal, match=reason):
        read_public(tmp_path, cloud.settings, method.model.bottom)


def test_a_public_set_that_is_no_such_file_is_refused(
    cloud: FederatedCloud, method: DistilMethod, tmp_path: Path
) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(Refusal, match=r"request\.public_id"):
            read_public(folder, cloud.settings, method.model.bottom)
    (tmp_path / PUBLIC_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(Refusal, match="cannot be read"):
        read_public(tmp_path, cloud.settings, method.model.bottom)


# ------------------------------------------------------------------------------------ one device


def test_a_device_starts_from_its_own_model_and_the_process_cache_leaks_nothing(
    cloud: FederatedCloud, method: DistilMethod, public: list[NDArray[np.int32]]
) -> None:
    folder = folder_of(cloud)
    first = method.fit(BEGIN, work_of(public, folder))
    # in the same process, and without a memory: the pretrained model again, not what was trained
    again = method.fit(BEGIN, work_of(public, folder))
    assert first.arrays[LOGITS].tobytes() == again.arrays[LOGITS].tobytes()
    # all but standing still shows where a round starts
    still = cloud.settings.model_copy(
        update={
            "train": cloud.settings.train.model_copy(
                update={"learning_rate": 1e-12, "head_learning_rate": 1e-12}
            )
        }
    )
    slow = DistilMethod(still, cloud.model_bundle[1], LABELS)
    state = {TEACHER: any_teacher()}
    second = slow.fit(state, work_of(public, folder, round=2, memory=first.memory))
    np.testing.assert_allclose(second.arrays[LOGITS], first.arrays[LOGITS], atol=1e-5)
    newcomer = slow.fit(state, work_of(public, folder, round=2))
    fresh = cloud.build(LABELS).logits(public)
    np.testing.assert_allclose(newcomer.arrays[LOGITS], fresh, atol=1e-5)
    assert np.abs(fresh - first.arrays[LOGITS]).max() > 1e-3


def test_the_teacher_reaches_the_device(
    cloud: FederatedCloud, method: DistilMethod, public: list[NDArray[np.int32]]
) -> None:
    """Beside the same private round: the more positive teacher gives the more positive device."""
    mean = {}
    for sign in (1, -1):
        state = {TEACHER: np.tile(np.array([-4.0, 4.0], np.float32) * sign, (PUBLIC, 1))}
        found = method.fit(state, work_of(public, folder_of(cloud), rounds=4))
        logits = found.arrays[LOGITS]
        mean[sign] = float((logits[:, 1] - logits[:, 0]).mean())
        private = -(-10 // 8)
        distilled = -(-PUBLIC // 8) * cloud.settings.federated.distil_epochs
        assert found.metrics["steps"] == private + distilled
    assert mean[1] > mean[-1] + 0.01


def test_a_retry_gives_the_same_bytes_and_trains_once(
    cloud: FederatedCloud, make: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make(2)
    fits = 0
    fit = DistilMethod.fit

    def counted(self: DistilMethod, state: State, work: Work) -> Outcome:
        nonlocal fits
        fits += 1
        return fit(self, state, work)

    monkeypatch.setattr(DistilMethod, "fit", counted)
    ask(device, cloud, BEGIN)
    state = {TEACHER: any_teacher()}
    first = ask(device, cloud, state, 2)
    memory = (device.home.root / "fit-kept.safetensors").read_bytes()
    retry = ask(device, cloud, state, 2)
    assert logits_of(first).tobytes() == logits_of(retry).tobytes()
    assert (device.home.root / "fit-kept.safetensors").read_bytes() == memory
    assert fits == 2
    assert retry.content.metric_records[METRICS]["new_fits"] == 0
    # another teacher in the same round is another answer, and the ledger's third
    other = ask(device, cloud, {TEACHER: any_teacher(seed=1)}, 2)
    assert logits_of(other).tobytes() != logits_of(first).tobytes()
    assert (fits, other.content.metric_records[METRICS]["spent_fits"]) == (3, 3)


def test_nothing_but_logits_leaves(
    cloud: FederatedCloud, make: Callable[..., Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make(1)
    reply = ask(device, cloud, BEGIN)
    assert logits_of(reply).shape == (PUBLIC, 2)
    assert set(reply.content) == {ANSWER, FIT_HEADER, METRICS}
    # far less than the adapters, which stay
    assert len(wire_bytes_of(reply)) < PUBLIC * 2 * 4 + 2000
    assert (device.home.root / "fit-kept.safetensors").stat().st_size > 100_000

    fit = DistilMethod.fit
    for spoil in (
        lambda out: {**out.arrays, "head": np.zeros(3, np.float32)},
        lambda out: {LOGITS: out.arrays[LOGITS][:-1]},
        lambda out: {LOGITS: out.arrays[LOGITS] * np.float32(np.nan)},
    ):

        def leaky(self: DistilMethod, state: State, work: Work, spoil: Any = spoil) -> Outcome:
            out = fit(self, state, work)
            return dataclasses.replace(out, arrays=spoil(out))

        monkeypatch.setattr(DistilMethod, "fit", leaky)
        (device.home.root / "fit-kept.safetensors").unlink()
        kept_in = ask(device, cloud, BEGIN)
        assert kept_in.has_error()
        assert kept_in.error.reason.startswith("egress guard: answer")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({TEACHER: np.full((PUBLIC, 2), np.nan, np.float32)}, "NaN or Inf"),
        ({TEACHER: np.full((PUBLIC, 2), 21, np.float32)}, "request.teacher: beyond"),
        ({TEACHER: np.zeros((PUBLIC, 3), np.float32)}, "request.teacher: shape"),
        ({TEACHER: np.zeros((PUBLIC - 1, 2), np.float32)}, "request.teacher: shape"),
        ({TEACHER: np.zeros((PUBLIC, 2), np.float32)} | BEGIN, "request.state: must be"),
        ({"weights": np.zeros((PUBLIC, 2), np.float32)}, "request.state: must be"),
    ],
)
def test_a_hostile_teacher_is_refused(
    state: State, reason: str, cloud: FederatedCloud, make: Callable[..., Device]
) -> None:
    device = make(0)
    reply = ask(device, cloud, state, 2)
    assert reply.has_error()
    assert reply.error.reason.startswith("refused: ")
    assert reason in reply.error.reason
    assert not (device.home.root / "fit-kept.safetensors").exists()


def test_a_device_holds_the_public_set_to_its_rules(
    cloud: FederatedCloud, make: Callable[..., Device], tmp_path: Path
) -> None:
    save_file(HOSTILE["beyond"][0], tmp_path / PUBLIC_FILE)
    for path in tmp_path.iterdir():
        if path.name != PUBLIC_FILE:
            raise AssertionError(path.name)
    manifest = BundleCache(cloud.model_bundle[1].parent).add_folder(tmp_path)
    device = make(0)
    for public_id, reason in ((manifest.id, "vocabulary"), ("", "needs public sentences")):
        reply = ask(device, cloud, BEGIN, public_id=public_id)
        assert reply.has_error()
        assert reply.error.reason.startswith("refused: request.public_id: ")
        assert reason in reply.error.reason


# ------------------------------------------------------------------------------------- the cloud


class Fleet(Wire):
    """Devices without a network, and what was sent to them to work on."""

    def __init__(self, devices: dict[int, Device]) -> None:
        super().__init__(devices)
        self.sent: list[tuple[int, State]] = []
        self.got: dict[int, list[NDArray[np.float32]]] = {}
        self.before = self._before
        self.after = self._after

    def get_node_ids(self) -> list[int]:
        return sorted(self.devices)

    def _before(self, node: int, message: Message) -> None:
        if message.metadata.message_type == FIT:
            record = message.content.array_records[PAYLOAD]
            self.sent.append((node, {n: record[n].numpy() for n in record}))

    def _after(self, node: int, reply: Message) -> Message:
        if reply.has_content() and ANSWER in reply.content:
            self.got.setdefault(node, []).append(logits_of(reply))
        return reply


class Crash(DistilTuning):
    """A cloud that is gone when it has the second round's answers."""

    def take(self, arrays: State) -> dict[str, Any]:
        if self.progress.round == 1:
            raise KeyboardInterrupt
        return super().take(arrays)


def test_a_federation_learns_by_logits_alone_and_resumes_where_it_was(
    cloud: FederatedCloud, make: Callable[..., Device], tmp_path: Path
) -> None:
    fleet = Fleet({1: make(0), 2: make(3)})
    grid = cast("Grid", fleet)
    crashed = Crash(cloud, run_folder(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        crashed.start(grid)
    assert [set(state) for _, state in fleet.sent] == [{NO_TEACHER}] * 2 + [{TEACHER}] * 2

    # the teacher is the mean vote, weighted by examples
    sizes = [len(fleet.devices[n].holdings.train.texts) for n in (1, 2)]
    votes = [vote_of(fleet.got[n][0]) for n in (1, 2)]
    teacher = fleet.sent[2][1][TEACHER]
    np.testing.assert_allclose(teacher, np.average(votes, axis=0, weights=sizes), atol=1e-5)
    assert np.abs(teacher - np.mean(votes, axis=0)).max() > 1e-4
    assert not np.array_equal(fleet.got[1][0], fleet.got[2][0])

    resumed = DistilTuning(cloud, run_folder(tmp_path / "run"))
    resumed.start(grid)
    assert resumed.progress.round == 2
    # the repeated round asked for the same, so that no device worked again
    again = fleet.sent[4:]
    assert sorted(n for n, _ in again) == [1, 2]
    assert all(state[TEACHER].tobytes() == teacher.tobytes() for _, state in again)
    assert all(got[1].tobytes() == got[2].tobytes() for got in fleet.got.values())
    # the cloud's own model went on from where the first round had left it
    change = {n: resumed.state[n] - crashed.state[n] for n in resumed.state}
    norm = float(np.sqrt(sum(np.square(v).sum() for v in change.values())))
    record = resumed.progress.rounds[-1]
    assert record["update_norm"] == pytest.approx(norm, rel=1e-5)
    assert record["new_fits"] == 0
    assert {"test_accuracy", "eval_accuracy", "distil_loss"} <= set(record)

    # logits cross each way, and the model only to be judged
    model_bytes = sum(v.nbytes for v in resumed.state.values())
    for account in resumed.progress.traffic.values():
        up = account["up"] - account.get("provision_up", 0) - account.get("evaluate_up", 0)
        down = account["down"] - account.get("provision_down", 0) - account["evaluate_down"]
        assert up < 3 * (PUBLIC * 2 * 4 + 2000) + 4000
        assert down < 3 * (PUBLIC * 2 * 4 + 4000) + 4000
        assert account["evaluate_down"] > model_bytes
