"""Adding to a stored comparison: rows are kept, worked out anew beside each other, never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compare_kit import Recorded, plan_from, write_scenario
from rich.console import Console
from typer.testing import CliRunner

from privtune_flwr.cli import main
from privtune_flwr.compare import command
from privtune_flwr.compare.stored import extended
from privtune_flwr.compare.summary import summarise
from privtune_flwr.config import ConfigError

METHODS = 'methods = ["central", "ours", "fedavg-lora"]\n'
QUIET = Console(quiet=True)


def by_method(name: str, results: dict[str, Any]) -> None:
    accuracy = {"central": 0.8, "ours": 0.7, "fedavg-lora": 0.75}[name.partition("-x")[0]]
    results["final"]["test_accuracy"] = accuracy


def compared(folder: Path, methods: list[str], out: Path, **options: Any) -> dict[str, Any]:
    """Run a comparison of recorded results, with run folders of its own."""
    folder.mkdir(exist_ok=True)
    chosen = command.CompareOptions(methods=methods, runs=folder / "runs", out=out, **options)
    scenario = write_scenario(folder, METHODS)
    command.compare(scenario, chosen, console=QUIET, execute=Recorded(by_method))
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_rows_are_added_and_worked_out_beside_each_other(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    first = compared(tmp_path / "a", ["ours"], out)
    (ours,) = first["methods"]
    assert ours["points_below_central"] is None
    both = compared(tmp_path / "b", ["fedavg-lora", "central"], out, extend=True)
    # in the methods' own order, whatever was run first
    assert [row["method"] for row in both["methods"]] == ["ours", "fedavg-lora", "central"]
    lost = {row["method"]: row["points_below_central"] for row in both["methods"]}
    assert lost == pytest.approx({"ours": 10, "fedavg-lora": 5, "central": 0})
    assert both["methods"][0]["curves"] == ours["curves"]
    assert {run["name"] for run in both["runs"]} == {
        f"{m}-x1-seed0" for m in ("ours", "fedavg-lora", "central")
    }
    assert all(axis["accuracy"].keys() == lost.keys() for axis in both["axes"])
    assert both["command"] == (
        "privtune compare small.toml --methods ours; "
        "privtune compare small.toml --methods fedavg-lora,central --extend"
    )
    assert "| ours | 1 | 70.0 | 10.0 |" in out.with_suffix(".md").read_text()
    # the same once more changes nothing
    assert compared(tmp_path / "b", ["fedavg-lora", "central"], out, extend=True) == both


def test_a_row_is_replaced_only_by_one_that_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    stored = compared(tmp_path / "a", ["ours", "central"], out)
    (tmp_path / "b").mkdir()
    plan = plan_from(tmp_path / "b", METHODS, methods=["ours"])
    begun = summarise(plan, "again")
    assert begun["methods"][0]["accuracy"] is None
    found = extended(stored, begun, out)
    assert found["methods"] == stored["methods"]
    assert found["runs"] == stored["runs"]
    done = {**begun, "methods": [{**stored["methods"][0], "accuracies": {"0": 0.6}}]}
    replaced = extended(stored, done, out)
    assert replaced["methods"][0]["points_below_central"] == pytest.approx(20)
    assert [run["name"] for run in replaced["runs"]] == ["central-x1-seed0", "ours-x1-seed0"]


def test_rows_of_another_scenario_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    stored = compared(tmp_path / "a", ["ours"], out)
    for part, key in (("scenario", "config"), ("scenario", "devices"), ("tuning", "seed")):
        other = {**stored, part: {**stored[part], key: 7}}
        with pytest.raises(ConfigError, match=rf"made with another {part}\.{key}"):
            extended(other, stored, out)
    # what a scenario says of itself may change
    said = {**stored, "scenario": {**stored["scenario"], "description": "another word"}}
    assert extended(said, stored, out)["methods"] == stored["methods"]
    # refused before anything runs
    out.write_text(json.dumps({**stored, "tuning": {}}))
    with pytest.raises(ConfigError, match=r"another tuning\.grid"):
        compared(tmp_path / "c", ["central"], out, extend=True)
    assert not (tmp_path / "c" / "runs").exists()


def test_rows_are_not_written_over_unasked(tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    stored = compared(tmp_path / "a", ["ours", "central"], out)
    scenario = write_scenario(tmp_path, METHODS)
    options = ["compare", scenario, "--methods", "central", "--out", str(out), "--table"]
    result = CliRunner().invoke(main, [*options, "--runs", str(tmp_path / "none")])
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert f"has rows that are not in {tmp_path / 'none'}: ours; --extend keeps them" in said
    assert json.loads(out.read_text()) == stored
    # where its runs lie, a row can be made again at any time
    result = CliRunner().invoke(main, [*options, "--runs", str(tmp_path / "a" / "runs")])
    assert result.exit_code == 0
    assert [row["method"] for row in json.loads(out.read_text())["methods"]] == ["central"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "methods": []}'])
def test_another_file_is_not_written_over(text: str, tmp_path: Path) -> None:
    out = tmp_path / "notes.json"
    out.write_text(text)
    with pytest.raises(ConfigError, match="is not a comparison"):
        compared(tmp_path / "a", ["ours"], out)
    assert out.read_text() == text
