"""The smashed store: what is committed stays, what is half written goes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privtune_flwr.training.store import SmashedStore

D = 4


def open_store(folder: Path, **options: Any) -> SmashedStore:
    return SmashedStore(folder, **{"hidden": D, "dtype": "float32"} | options)


def rows(value: float, count: int = 5) -> np.ndarray:
    return np.full((count, D), value, dtype=np.float32)


def fill(store: SmashedStore, *numbers: int) -> None:
    for n in numbers:
        store.append(("a", "train", 0, n), rows(n), [2, 3], [0, 1])


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    fill(open_store(tmp_path), 0, 1)
    store = open_store(tmp_path)
    store.append(("b", "eval", 2, 0), rows(7, 3), [3], None)
    assert [c.key for c in store] == [
        ("a", "train", 0, 0),
        ("a", "train", 0, 1),
        ("b", "eval", 2, 0),
    ]
    assert ("a", "train", 0, 1) in store
    assert ("a", "train", 1, 1) not in store
    first, second = store.examples(("a", "train", 0, 1))
    assert (first.offset, first.length, first.label) == (5, 2, 0)
    assert (second.offset, second.length, second.label) == (7, 3, 1)
    assert store.examples(("b", "eval", 2, 0))[0].label == -1
    np.testing.assert_array_equal(store.received(), np.concatenate([rows(0), rows(1), rows(7, 3)]))
    assert store.nbytes == 13 * D * 4


def test_a_chunk_keeps_what_came_beside_its_rows(tmp_path: Path) -> None:
    key = ("a", "train", 0, 0)
    metrics, traffic = {"spent_eta": 0.5}, {"up": 900, "down": 30, "messages": 1}
    open_store(tmp_path).append(key, rows(0), [5], None, metrics=metrics, traffic=traffic)
    entry = open_store(tmp_path)[key]
    assert (entry.metrics, entry.traffic) == (metrics, traffic)


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    fill(open_store(tmp_path), 0)
    index = tmp_path / "index.jsonl"
    entry = json.loads(index.read_text())
    del entry["metrics"], entry["traffic"]
    index.write_text(json.dumps(entry) + "\n")
    assert open_store(tmp_path)[("a", "train", 0, 0)].traffic == {}


def test_a_chunk_comes_in_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 0)
    with pytest.raises(ValueError, match="already in the store"):
        fill(store, 0)
    with pytest.raises(ValueError, match="already in the store"):
        fill(open_store(tmp_path), 0)
    assert len(open_store(tmp_path).received()) == 5


@pytest.mark.parametrize("left", [1, 20, 40])
def test_a_truncated_index_line_and_its_rows_are_dropped(tmp_path: Path, left: int) -> None:
    fill(open_store(tmp_path), 0, 1)
    index = tmp_path / "index.jsonl"
    first, second = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(first + second[:left])
    store = open_store(tmp_path)
    assert [c.chunk for c in store] == [0]
    assert (tmp_path / "rows.bin").stat().st_size == 5 * D * 4
    fill(store, 1, 2)
    np.testing.assert_array_equal(open_store(tmp_path).received()[::5, 0], [0, 1, 2])


def test_rows_beyond_the_index_are_cut_off(tmp_path: Path) -> None:
    fill(open_store(tmp_path), 0)
    with (tmp_path / "rows.bin").open("ab") as file:
        file.write(b"half a row")
    store = open_store(tmp_path)
    fill(store, 1)
    np.testing.assert_array_equal(store.received(), np.concatenate([rows(0), rows(1)]))


def test_half_precision_halves_the_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path, dtype="float16")
    fill(store, 3)
    assert store.received().dtype == np.float16
    assert (tmp_path / "rows.bin").stat().st_size == store.nbytes == 5 * D * 2


def test_the_decoder_runs_once_a_chunk_and_leaves_what_was_received(tmp_path: Path) -> None:
    calls: list[int] = []

    def decode(received: np.ndarray) -> np.ndarray:
        calls.append(len(received))
        return received + 10

    fill(open_store(tmp_path, decoder=decode), 0, 1)
    store = open_store(tmp_path, decoder=decode)
    assert calls == [5, 5]
    np.testing.assert_array_equal(store.received()[::5, 0], [0, 1])
    np.testing.assert_array_equal(store.training_rows()[::5, 0], [10, 11])
    with (tmp_path / "decoded.bin").open("ab") as file:
        file.write(bytes(100))
    store = open_store(tmp_path, decoder=decode)
    fill(store, 2)
    np.testing.assert_array_equal(store.training_rows()[::5, 0], [10, 11, 12])


def test_without_a_decoder_training_reads_what_was_received(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.training_rows().shape == (0, D)
    fill(store, 4)
    np.testing.assert_array_equal(store.training_rows(), store.received())
    assert not (tmp_path / "decoded.bin").exists()


def test_rows_are_mapped_not_read(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, 0)
    mapped = store.received()
    assert isinstance(mapped, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped[0, 0] = 1


APPENDS = """
import sys
from pathlib import Path
import numpy as np
from privtune_flwr.training.store import SmashedStore
store = SmashedStore(Path(sys.argv[1]), hidden=256, dtype="float32", decoder=lambda r: r + 1)
n = len(list(store))
while True:
    store.append(("a", "train", 0, n), np.full((64, 256), n, np.float32), [32, 32], [0, 1])
    n += 1
"""


def test_a_store_that_was_killed_while_appending_holds_whole_chunks(tmp_path: Path) -> None:
    index = tmp_path / "index.jsonl"
    before = 0
    for trial in range(5):
        writer = subprocess.Popen([sys.executable, "-c", APPENDS, str(tmp_path)])
        deadline = time.monotonic() + 60
        while not index.exists() or index.read_bytes().count(b"\n") < before + 5:
            assert time.monotonic() < deadline
            assert writer.poll() is None
            time.sleep(0.002)
        time.sleep(0.001 * trial)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        store = SmashedStore(tmp_path, hidden=256, dtype="float32", decoder=lambda r: r + 1)
        chunks = list(store)
        assert [c.chunk for c in chunks] == list(range(len(chunks)))
        expected = np.repeat(np.arange(len(chunks), dtype=np.float32), 64)
        np.testing.assert_array_equal(store.received()[:, 0], expected)
        np.testing.assert_array_equal(store.training_rows()[:, -1], expected + 1)
        assert (tmp_path / "rows.bin").stat().st_size == store.nbytes
        assert len(chunks) >= before + 5
        before = len(chunks)
