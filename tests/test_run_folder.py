"""A run's folder: made once, resumed unchanged, used by one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from privtune_flwr.config import ConfigError, RunConfig, flatten, load_run_config
from privtune_flwr.errors import RunError
from privtune_flwr.results.run_folder import RunFolder, open_run_folder


def config(root: Path, **changes: Any) -> RunConfig:
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return load_run_config({"run.folder": str(root), "run.name": "one"} | flat)


def opened(root: Path, **changes: Any) -> RunFolder:
    folder = open_run_folder(config(root, **changes))
    folder.lock.release()
    return folder


def test_a_new_run_writes_its_configuration_and_id(tmp_path: Path) -> None:
    folder = opened(tmp_path, model__cut=3)
    known = json.loads((folder.path / "config.json").read_text())
    assert folder.path == tmp_path / "one"
    assert folder.name == "one"
    assert known == {"run_id": folder.run_id, "config": flatten(config(tmp_path, model__cut=3))}
    assert len(folder.run_id) == 32
    assert opened(tmp_path, run__name="two").run_id != folder.run_id


def test_a_run_without_a_name_is_called_after_time_and_mechanism(tmp_path: Path) -> None:
    assert opened(tmp_path, run__name="", privacy__mechanism="dchi").name.endswith("-dchi")


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(ConfigError, match=r"run.name = 'one'.*exists.*run.resume"):
        opened(tmp_path)
    assert opened(tmp_path, run__resume=True).run_id == folder.run_id


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        opened(tmp_path, run__resume=True)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model__cut": 3}, "model.cut = 3: the run to resume has 2"),
        ({"privacy__noise": 0.5}, "privacy.noise = 0.5"),
        ({"train__epochs": 9}, "train.epochs = 9"),
        ({"run__seed": 1}, "run.seed = 1: the run to resume has 0"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, run__resume=True, **changes)
    assert key in str(caught.value)


def test_what_does_not_change_the_result_may_change(tmp_path: Path) -> None:
    first = opened(tmp_path)
    free = {"train__timeout": 5.0, "train__threads": 1, "train__device": "cpu", "run__wait": 1.0}
    assert opened(tmp_path, run__resume=True, **free).run_id == first.run_id


HOLDS = """
import sys
from pathlib import Path
from filelock import FileLock
lock = FileLock(Path(sys.argv[1]) / ".lock")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_that_another_process_runs_is_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    command = [sys.executable, "-c", HOLDS, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is running"):
            opened(tmp_path, run__resume=True)
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    opened(tmp_path, run__resume=True)


def test_files_are_written_whole_and_read_back(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    assert folder.read_json("results.json") is None
    folder.write_json("results.json", {"b": 1, "a": [2.5, None]})
    assert folder.read_json("results.json") == {"a": [2.5, None], "b": 1}
    with pytest.raises(TypeError):
        folder.write_json("results.json", {"a": object()})
    assert folder.read_json("results.json") == {"a": [2.5, None], "b": 1}
    folder.write_jsonl("rounds.jsonl", [{"round": 1}, {"round": 2}])
    lines = (folder.path / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 1}, {"round": 2}]
    assert not list(folder.path.glob("*.tmp")) + list(folder.path.glob(".*.tmp"))
