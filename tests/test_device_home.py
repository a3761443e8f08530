"""A device's folder: a secret that is one, an identity that is its own, an order it keeps."""

from __future__ import annotations

import json
import multiprocessing
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from privtune_flwr.config import RunConfig
from privtune_flwr.device import DeviceHome, open_holdings, open_home
from privtune_flwr.device.home import DeviceError, simulated_root
from privtune_flwr.errors import Refusal

RUN_ID = "ab" * 16


def home_at(root: Path, **node_config: Any) -> DeviceHome:
    config = {"device-home": str(root), **node_config}
    return open_home(config, run_id=RUN_ID, simulated=False, seed=0)


def test_the_secret_is_32_bytes_that_only_the_owner_reads_and_stays(tmp_path: Path) -> None:
    root = tmp_path / "home"
    first, again = home_at(root), home_at(root)
    assert len(first.secret) == 32
    assert (first.secret, first.device_id) == (again.secret, again.device_id)
    assert stat.S_IMODE((root / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert sorted(p.name for p in root.iterdir()) == ["bundles", "device-id", "secret"]


def test_a_real_devices_secret_does_not_come_from_the_seed(tmp_path: Path) -> None:
    homes = [home_at(tmp_path / name) for name in ("a", "b")]
    assert homes[0].secret != homes[1].secret
    assert homes[0].device_id != homes[1].device_id


def test_a_simulated_device_is_reproducible_and_belongs_to_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRIVTUNE_CACHE", str(tmp_path))

    def open_one(partition: int, seed: int, run_id: str) -> DeviceHome:
        node = {"partition-id": partition, "device-home": str(tmp_path / "ignored")}
        return open_home(node, run_id=run_id, simulated=True, seed=seed)

    one = open_one(3, 0, "a" * 32)
    assert one.device_id == "device-00003"
    assert one.root.parent == simulated_root("a" * 32)
    assert one.secret == open_one(3, 0, "b" * 32).secret
    assert one.secret != open_one(4, 0, "a" * 32).secret
    assert one.secret != open_one(3, 1, "c" * 32).secret
    with pytest.raises(DeviceError, match="run id"):
        simulated_root("../../somewhere")


def _open_all(meet: Barrier, roots: list[Path], found: Path) -> None:
    meet.wait(60)
    homes = [home_at(root) for root in roots]
    found.write_text(json.dumps([(home.secret.hex(), home.device_id) for home in homes]))


def test_processes_that_meet_at_the_first_use_agree(tmp_path: Path) -> None:
    roots = [tmp_path / str(n) for n in range(40)]
    # spawned: other tests leave threads behind, whose locks a fork would inherit for good
    spawn = multiprocessing.get_context("spawn")
    meet, found = spawn.Barrier(3), [tmp_path / f"{n}.json" for n in range(3)]
    family = [spawn.Process(target=_open_all, args=(meet, roots, file)) for file in found]
    for process in family:
        process.start()
    for process in family:
        process.join(120)
    seen = [json.loads(file.read_text()) for file in found]
    assert seen[0] == seen[1] == seen[2]
    assert len({secret for secret, _ in seen[0]}) == len({name for _, name in seen[0]}) == 40
    assert not list(tmp_path.glob("*/tmp*"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
@pytest.mark.parametrize("name", ["secret", "device-id"])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, name: str, mode: int) -> None:
    home_at(tmp_path)
    (tmp_path / name).chmod(mode)
    with pytest.raises(DeviceError, match=rf"{name}: mode {mode:04o}, must be 0600"):
        home_at(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("secret", b"short"), ("secret", b""), ("device-id", b"")]
)
def test_a_damaged_file_is_refused_not_replaced(tmp_path: Path, name: str, content: bytes) -> None:
    home_at(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DeviceError, match=f"{name}: damaged"):
        home_at(tmp_path)
    assert (tmp_path / name).read_bytes() == content


def test_the_device_id_does_not_depend_on_the_secret(tmp_path: Path) -> None:
    before = home_at(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(32))
    after = home_at(tmp_path)
    assert after.secret == bytes(32)
    assert after.device_id == before.device_id
    assert before.secret.hex()[:8] not in before.device_id


def test_keys_of_different_purposes_differ(tmp_path: Path) -> None:
    home = home_at(tmp_path)
    keys = {home.derive(purpose) for purpose in ("noise", "mark", "ledger", "order")}
    assert len(keys | {home.secret}) == 5
    assert home.example_key("a text") == home_at(tmp_path).example_key("a text")
    assert home.example_key("a text") != home.example_key("a tex")
    assert home.example_key("a text") != home_at(tmp_path / "other").example_key("a text")


# ---------------------------------------------------------------------------------------- holdings


def held_by(root: Path, config: RunConfig | None = None, **node_config: Any) -> Any:
    node = {"partition-id": 0, "num-partitions": 10} | node_config
    return open_holdings(config or RunConfig(), node, home_at(root))


def test_the_order_of_examples_is_keyed_by_the_secret(tmp_path: Path) -> None:
    one, again, other = (held_by(tmp_path / n) for n in ("a", "a", "b"))
    assert one == again
    assert one.train.texts != other.train.texts
    assert sorted(one.train.texts) == sorted(other.train.texts)
    # labels move with their texts
    pairs = [sorted(zip(h.train.texts, h.train.labels, strict=True)) for h in (one, other)]
    assert pairs[0] == pairs[1]
    assert one.train.labels != sorted(one.train.labels)


def test_chunks_cover_a_split_once_and_end(tmp_path: Path) -> None:
    held = held_by(tmp_path)
    chunks = [held.chunk("train", n, 100) for n in range(4)]
    assert [len(c.texts) for c in chunks] == [100, 100, 100, 20]
    assert [t for c in chunks for t in c.texts] == held.train.texts
    for number in (4, -1):
        with pytest.raises(Refusal, match=r"request\.chunk = "):
            held.chunk("train", number, 100)


def test_a_device_without_data_and_without_a_partition_refuses(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="node-config: needs data, or partition-id"):
        open_holdings(RunConfig(), {"partition-id": 0}, home_at(tmp_path))


@pytest.fixture
def own_csv(tmp_path: Path) -> Path:
    rows = [f"my own note number {n},{'good' if n % 2 else 'bad'},patient {n}" for n in range(40)]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["review,mood,who", *rows]) + "\n")
    return path


def test_a_device_reads_its_own_file(tmp_path: Path, own_csv: Path) -> None:
    columns = {"text-column": "review", "label-column": "mood"}
    held = held_by(tmp_path / "a", data=str(own_csv), **columns)
    assert held.label_names == ("bad", "good")
    texts = held.train.texts + held.evaluation.texts
    assert sorted(texts) == sorted(f"my own note number {n}" for n in range(40))
    assert len(held.evaluation.texts) == round(40 * 400 / 3600)
    assert held.train.texts != sorted(held.train.texts)
    for text, label in zip(held.train.texts, held.train.labels, strict=True):
        assert held.label_names[label] == ("good" if int(text.split()[-1]) % 2 else "bad")
    # which rows evaluate is the device's secret too
    other = held_by(tmp_path / "b", data=str(own_csv), **columns)
    assert set(held.evaluation.texts) != set(other.evaluation.texts)


def test_a_run_cannot_pick_the_column_that_leaves_as_class_names(
    tmp_path: Path, own_csv: Path
) -> None:
    data = RunConfig().data.model_copy(update={"text_column": "review", "label_column": "who"})
    config = RunConfig().model_copy(update={"data": data})
    columns = {"text-column": "review", "label-column": "mood"}
    assert held_by(tmp_path / "a", config, data=str(own_csv), **columns).label_names == (
        "bad",
        "good",
    )
    with pytest.raises(Exception, match="'text'"):
        held_by(tmp_path / "a", config, data=str(own_csv))
