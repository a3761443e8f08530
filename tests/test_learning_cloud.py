"""Learning before the release: what the cloud makes of the devices' updates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_kit import Device
from flwr.app import Array, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from learned_kit import (
    DRAFT,
    WIDTH,
    ToyLearner,
    Wire,
    fleet_of,
    make_cloud,
    provision,
    run_folder,
)
from learning_kit import FEW, LEARNS, MakeDevice, flat
from scipy import stats

from privtune_flwr.bundle import BundleCache
from privtune_flwr.cloud import CloudSide
from privtune_flwr.config import ConfigError, RunConfig, flatten, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.errors import InvalidReplyError, RunError
from privtune_flwr.learned import adopt_learned, load_state
from privtune_flwr.models import CutModel
from privtune_flwr.privacy.base import MechanismError
from privtune_flwr.privacy.learned_update import (
    check_change,
    learning_statement,
    privatise,
)
from privtune_flwr.privacy.mods import FAILED
from privtune_flwr.protocol import (
    LEARN,
    SMASHED,
    UPDATE,
    read_release,
)
from privtune_flwr.training.averaging import federate_in_process
from strategies.learning import LearningPhase, learn_first, learning_terms

pytestmark = pytest.mark.usefixtures("one_torch_thread", "registered")


# ------------------------------------------------------------------------------- in the cloud


@pytest.fixture(scope="module")
def devices(make_device: MakeDevice, registered: None) -> dict[int, Device]:
    return {
        node: make_device(run=FEW, partition_id=node - 1, num_partitions=10, **LEARNS)
        for node in (1, 2, 3)
    }


@pytest.fixture
def cloud_of(
    minilm: CutModel, devices: dict[int, Device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CloudSide]:
    bundles = BundleCache(tmp_path / "cloud-bundles")
    monkeypatch.setattr("privtune_flwr.cloud.cloud_cache", lambda: bundles)
    # who sends a message: Flower sets it where a server app runs
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)

    def make(**learning: Any) -> CloudSide:
        settings = {f"privacy.learning.{name}": value for name, value in learning.items()}
        base = {"privacy.mechanism": "toy-learned", "model.cut": 1} | FEW
        config = load_run_config(
            flatten(RunConfig()) | base | {"privacy.learning.rounds": 3} | settings
        )
        return make_cloud(config, minilm, devices[1].bundles, devices[1].bottom_id)

    return make


def test_the_fleet_learns_a_mechanism_and_releases_with_it(
    devices: dict[int, Device], cloud_of: Callable[..., CloudSide], tmp_path: Path
) -> None:
    cloud, folder = cloud_of(), run_folder(tmp_path / "run")
    fleet, exchange = fleet_of(Wire(devices))
    assert cloud.learns
    progress, earlier = LearningPhase(cloud, folder, fleet, exchange).run()
    assert (cloud.learns, earlier, progress.round) == (False, 0.0, 3)
    assert cloud.spec != DRAFT
    losses = [r["loss"] for r in progress.rounds]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-3
    assert [r["kind"] for r in progress.rounds] == ["learn"] * 3
    assert {r["devices"] for r in progress.rounds} == {3}
    assert progress.traffic.keys() == fleet.nodes.keys()
    assert all(a["up"] > 4 * 3 * 384 * WIDTH for a in progress.traffic.values())

    # a device releases narrow rows with what was learned, on every wire
    device = devices[1]
    provision(device, cloud)
    texts = device.holdings.chunk("train", 0, 4).texts
    ids = tokenise(cloud.bottom.tokenizer, texts, 128)
    wanted = np.concatenate(
        [
            cloud.mechanism.perturb(h, i, np.random.default_rng(0))
            for h, i in zip(cloud.bottom.encode(ids), ids, strict=True)
        ]
    )
    for wire, within in (
        ("float16", 0.0),
        ("float32", 0.0),
        ("float32-padded", 0.0),
        ("int8", 0.6),
    ):
        asked = device.request(spec=cloud.spec, wire=wire)
        reply = device.ask(asked)
        assert reply.has_content(), reply.error
        chunk = read_release(
            reply.content,
            asked,
            device_id=device.home.device_id,
            examples=4,
            hidden=cloud.width,
            num_labels=2,
        )
        assert chunk.rows_ND.shape == (sum(map(len, ids)), WIDTH)
        assert np.abs(chunk.rows_ND - wanted).max() <= within
        assert chunk.metrics["bits_max"] == 24.0
        assert "eta_max" not in chunk.metrics
    with pytest.raises(InvalidReplyError, match="hidden: must be 384"):
        read_release(
            reply.content,
            asked,
            device_id=device.home.device_id,
            examples=4,
            hidden=384,
            num_labels=2,
        )
    # the draft itself releases nothing
    assert device.ask(device.request(spec=DRAFT)).error.code == FAILED
    assert SMASHED in reply.content


def test_a_phase_killed_in_round_three_ends_like_an_unbroken_one(
    devices: dict[int, Device],
    make_device: MakeDevice,
    cloud_of: Callable[..., CloudSide],
    tmp_path: Path,
) -> None:
    settings = {"clip": 0.05, "noise": 0.5}
    whole = cloud_of(**settings)
    LearningPhase(whole, run_folder(tmp_path / "whole"), *fleet_of(Wire(devices))).run()
    before = {n: d.home.ledger.spent().updates for n, d in devices.items()}

    wire = Wire(devices)

    def kill(node: int, message: Message) -> None:
        asked = message.content.config_records["request"]
        if (asked["round"], node) == (3, 2):
            raise KeyboardInterrupt

    wire.before = kill
    with pytest.raises(KeyboardInterrupt):
        LearningPhase(cloud_of(**settings), run_folder(tmp_path / "broken"), *fleet_of(wire)).run()
    folder = run_folder(tmp_path / "broken")
    saved = load_state(folder.path)
    assert saved is not None
    assert saved[1].round == 2
    again = cloud_of(**settings)
    assert not adopt_learned(again, folder.path)
    fleet, exchange = fleet_of(Wire(devices))
    progress, earlier = LearningPhase(again, folder, fleet, exchange).run()
    assert earlier > 0
    assert [r["round"] for r in progress.rounds] == [1, 2, 3]
    assert again.spec.id == whole.spec.id
    assert {n: d.home.ledger.spent().updates for n, d in devices.items()} == before
    # whoever opens the run later gets the learned mechanism, not the draft
    later = cloud_of(**settings)
    assert adopt_learned(later, folder.path)
    assert later.spec == whole.spec
    assert later.bundles[1][0].id == later.spec.artefact
    # and no other files in its place
    artefact = folder.path / "learned" / "artefact" / "learned.safetensors"
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="its files are not those it names"):
        adopt_learned(cloud_of(**settings), folder.path)


def test_without_rounds_nothing_is_asked_of_devices_and_strict_ones_release(
    make_device: MakeDevice, cloud_of: Callable[..., CloudSide], tmp_path: Path
) -> None:
    settings = {"rounds": 0, "warm-start": "labels"}
    cloud, folder = cloud_of(**settings), run_folder(tmp_path / "run")
    strict = make_device(run=FEW, policy_learning_rounds=0)
    wire = Wire({1: strict})

    def refuse(node: int, message: Message) -> None:
        raise AssertionError("a device was asked")

    wire.before = refuse
    assert learning_terms(cloud)["learning_rounds"] == 0
    fleet, exchange = fleet_of(wire)
    other = run_folder(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"warm-start = 'labels'.*the task has neg, pos"):
        LearningPhase(cloud_of(**settings), other, fleet, exchange).run()
    fleet.label_names = ("negative", "positive")
    LearningPhase(cloud_of(**settings), other, fleet, exchange).run()
    # what was learned is brought to the devices, which is all that they hear of it
    fleet, exchange = fleet_of(Wire({1: strict}))
    fleet.label_names = ("negative", "positive")
    rounds, earlier = learn_first(cloud, folder, fleet, exchange)
    assert (rounds, earlier, cloud.learns) == ([], 0.0, False)
    assert cloud.seconds["start"] == 1.5  # as the learner says
    device = make_device(run=FEW, policy_learning_rounds=0)
    provision(device, cloud)
    assert device.ask(device.request(spec=cloud.spec)).has_content()
    # a run that goes on takes it up from its folder, and knows what it took
    later = cloud_of(**settings)
    assert adopt_learned(later, folder.path)
    rounds, earlier = learn_first(later, folder, *fleet_of(wire))
    assert rounds == []
    assert earlier > 0
    assert later.seconds["start"] == cloud.seconds["start"]


def test_faults_refusals_and_poison_do_not_stop_the_others(
    devices: dict[int, Device],
    make_device: MakeDevice,
    cloud_of: Callable[..., CloudSide],
    tmp_path: Path,
) -> None:
    strict = make_device(run=FEW, partition_id=3, policy_learning_rounds=1)
    poison = make_device(run=FEW, partition_id=4, **LEARNS)
    wire = Wire({**devices, 4: strict, 5: poison})
    fails = iter([True])

    def spoil(node: int, reply: Message) -> Message:
        if node == 2 and next(fails, False):
            return Message(Error(code=FAILED, reason="device failed"), reply_to=_asked())
        if node == 5:
            record = reply.content.array_records[UPDATE]
            record["bias"] = Array(np.full(WIDTH, np.nan, np.float32))
        return reply

    wire.after = spoil
    fleet, exchange = fleet_of(wire)
    names = {node: name for name, node in fleet.nodes.items()}
    cloud = cloud_of(rounds=2)
    folder = run_folder(tmp_path / "run")
    progress, _ = LearningPhase(cloud, folder, fleet, exchange).run()
    assert names[2] in fleet.nodes
    assert progress.rounds[0]["absent"] == {names[2]: "device failed"}
    assert [r["devices"] for r in progress.rounds] == [2, 3]
    assert "policy.learning-rounds" in fleet.refused[names[4]]
    assert "NaN or Inf" in fleet.quarantined[names[5]]
    assert set(progress.dropped) == {names[4], names[5]}
    json.dumps(progress.rounds)


def test_a_round_without_anyone_ends_the_run_and_says_why(
    make_device: MakeDevice, cloud_of: Callable[..., CloudSide], tmp_path: Path
) -> None:
    fleet, exchange = fleet_of(Wire({1: make_device(run=FEW)}))
    with pytest.raises(RunError, match=r"learning round 1: no device .*policy\.learning-rounds"):
        LearningPhase(cloud_of(), run_folder(tmp_path / "run"), fleet, exchange).run()


def test_noise_without_a_clip_is_a_mistake_of_the_run(cloud_of: Callable[..., CloudSide]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.learning\.noise = 1\.0: is in units"):
        learning_terms(cloud_of(noise=1.0))
    terms = {"learning_rounds": 3, "clip": 1.0, "noise": 1.0}
    assert learning_terms(cloud_of(noise=1.0, clip=1.0)) == terms


def _asked() -> Message:
    from device_kit import message_to

    return message_to(RecordDict(), LEARN)


# -------------------------------------------------------------------------- averaging, numbers


def test_one_process_learns_what_the_fleet_learns(
    devices: dict[int, Device], minilm: CutModel, cloud_of: Callable[..., CloudSide], tmp_path: Path
) -> None:
    cloud = cloud_of(rounds=1)
    LearningPhase(cloud, run_folder(tmp_path / "run"), *fleet_of(Wire(devices))).run()
    saved = load_state(tmp_path / "run")
    assert saved is not None
    parts = []
    for device in devices.values():
        held = device.holdings.train
        parts.append((tokenise(minilm.bottom.tokenizer, held.texts, 128), held.labels))
    learner = ToyLearner(minilm.bottom, 2)
    alone = federate_in_process(learner, parts, rounds=1, seeds=[1, 2, 3])
    # other seeds, so other step sizes, but the same direction
    start = learner.start()
    one, two = (flat(s) - flat(start) for s in (alone, saved[0]))
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) > 0.98
    again = federate_in_process(learner, parts, rounds=1, seeds=[1, 2, 3])
    np.testing.assert_array_equal(flat(again), flat(alone))
    # the weights are the numbers of examples
    first, second = parts[0], (parts[1][0][:3], parts[1][1][:3])
    both = federate_in_process(learner, [first, second], rounds=1, seeds=[1, 2])
    single = [
        federate_in_process(learner, [part], rounds=1, seeds=[seed])
        for part, seed in ((first, 1), (second, 2))
    ]
    share = len(first[0]) / (len(first[0]) + 3)
    np.testing.assert_allclose(
        flat(both), share * flat(single[0]) + (1 - share) * flat(single[1]), atol=1e-6
    )
    noisy = federate_in_process(learner, parts, rounds=1, seeds=[1, 2, 3], clip=0.01, noise=1.0)
    clipped = federate_in_process(learner, parts, rounds=1, seeds=[1, 2, 3], clip=0.01)
    weights = np.array([len(p[0]) for p in parts]) / sum(len(p[0]) for p in parts)
    std = 0.01 * np.sqrt(np.square(weights).sum())
    assert stats.kstest((flat(noisy) - flat(clipped)) / std, "norm").pvalue > 1e-3


def test_what_cannot_be_privatised_is_not() -> None:
    change = {"a": np.ones(4, np.float32)}
    with pytest.raises(MechanismError, match="noise needs a clip"):
        privatise(change, clip=0.0, noise=1.0, rng=np.random.default_rng(0))
    with pytest.raises(MechanismError, match="and a generator"):
        privatise(change, clip=1.0, noise=1.0, rng=None)
    with pytest.raises(MechanismError, match="names"):
        check_change({"b": change["a"]}, change)
    with pytest.raises(MechanismError, match="must be float32"):
        check_change({"a": np.ones(4)}, change)  # type: ignore[dict-item]
    zero = {"a": np.zeros(4, np.float32)}
    np.testing.assert_array_equal(privatise(zero, clip=1.0, noise=0.0, rng=None)["a"], zero["a"])


def test_the_statement_has_the_numbers() -> None:
    words = learning_statement(5, 1.0, 2.0)
    assert "2.5-zCDP (0.5 an update)" in words
    assert f"({2.5 + 2 * math.sqrt(2.5 * math.log(1e5)):.6g}, 1e-05)" in words
    assert learning_statement(5, 1.0, 0.0).startswith("No guarantee")
    assert "sent as they were" in learning_statement(5, 0.0, 0.0)
