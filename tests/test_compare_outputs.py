"""Comparisons of recorded runs: tables, files, figures, the command line."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from compare_kit import GRID, TWO, Recorded, by_multiplier, plan_from, recorded, run, write_scenario
from typer.testing import CliRunner

from privtune_flwr.cli import main
from privtune_flwr.compare import command
from privtune_flwr.compare.runner import gather
from privtune_flwr.compare.summary import DEFINITIONS, summarise
from privtune_flwr.compare.table import (
    as_csv,
    costs_markdown,
    guarantee_words,
    markdown,
    short_markdown,
)

INVERSION = {
    "attack": "span",
    "token_recall": 0.5,
    "content_recall": 0.4,
    "floor": {"token_recall": 0.3, "content_recall": 0.2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    text = 'methods = ["ours", "fedavg-lora", "central", "local"]\n' + GRID
    plan = plan_from(
        tmp_path_factory.mktemp("done"), text + 'seeds = [0, 1, 2]\nsingle-seed = ["local"]\n'
    )
    base = {"ours": 0.70, "fedavg-lora": 0.75, "central": 0.80, "local": 0.60}

    def change(name: str, results: dict[str, Any]) -> None:
        by_multiplier(name, results)
        seed = int(name[-1])
        results["final"]["test_accuracy"] = base[name.partition("-x")[0]] + seed / 100
        results["final"]["test_loss"] = 0.5 + seed / 10
        if name.startswith("central"):
            results["final"]["test_accuracy"] += seed / 100
            for record in results["per_round"]:
                del record["bytes_up"], record["bytes_down"]

    run(plan, Recorded(change))
    return plan, summarise(plan, "privtune compare small.toml")


def test_rows_hold_mean_spread_and_distance_to_central(
    finished: tuple[Any, dict[str, Any]],
) -> None:
    rows = {r["method"]: r for r in finished[1]["methods"]}
    ours = rows["ours"]
    assert (ours["seeds"], ours["multiplier"]) == ([0, 1, 2], 3.0)
    assert ours["accuracy"] == pytest.approx(0.71)
    assert ours["sd"] == pytest.approx(0.01)  # of a sample: n - 1
    # the label's perplexity is the exponential of each seed's loss, not of their mean
    losses = [0.5, 0.6, 0.7]
    assert ours["perplexity"] == pytest.approx(sum(math.exp(x) for x in losses) / 3)
    assert ours["perplexity_sd"] == pytest.approx(statistics.stdev(map(math.exp, losses)))
    assert rows["local"]["perplexity_sd"] is None
    # central is 80, 82, 84: seed by seed 10, 11, 12 above ours
    assert ours["points_below_central"] == pytest.approx(11)
    # one seed is held against central's same seed, not against its mean
    assert rows["local"]["points_below_central"] == pytest.approx(20)
    assert rows["local"]["sd"] is None
    assert ours["rates"]["train.learning-rate"] == pytest.approx(1.5e-4)
    assert [p["eval_accuracy"] for p in ours["grid"]] == pytest.approx([0.53, 0.6, 0.8])
    assert rows["central"]["projection"] is None
    assert ours["projection"]["projected"] is True
    assert ours["settings"] == {"train.strategy": "split"}
    assert "2 learning rounds" in ours["cloud_sees"]
    assert rows["local"]["cloud_sees"] == "nothing"
    assert set(DEFINITIONS) - {"guarantee"} <= set(ours)


def test_equal_budgets_are_stored(finished: tuple[Any, dict[str, Any]]) -> None:
    axes = {(a["axis"], a["of"]): a for a in finished[1]["axes"]}
    # the bottleneck's learning rounds cost more than adapters do
    assert {axis for axis, _ in axes} == {"epochs", "bytes", "seconds"}
    assert axes["bytes", "fedavg-lora"]["accuracy"]["ours"] is None
    assert axes["bytes", "ours"]["accuracy"]["ours"] is not None


def test_the_tables_say_how_rates_were_chosen_and_what_is_projected(
    finished: tuple[Any, dict[str, Any]],
) -> None:
    content = finished[1]
    text = markdown(content)
    assert "same grid: 0.3, 1, 3" in text
    assert "never by the test set" in text
    assert "| ours | 3 | 71.0 ± 1.0 | 11.0 |" in text
    assert "Projected, not measured" in text
    assert "At an end of the grid" in text
    assert "ours (x 3)" in text
    assert "**80.0**" in text  # the chosen point's accuracy on the devices
    short, costs = short_markdown(content), costs_markdown(content)
    for line in (short + costs).splitlines():
        assert not line.startswith("#")
    # the page that people read first says what is promised, and apart from it against whom
    ours = next(r for r in content["methods"] if r["method"] == "ours")["guarantee"]
    assert f"| {guarantee_words({**ours, 'against': None})} |" in short
    assert f"(against {ours['against']})" not in short
    assert f"Promised against whom: ours: {ours['against']}." in short
    assert "one 5x slower" in costs
    assert "one 5x slower" not in short
    assert costs.count("| ours |") == 3  # all columns, equal budgets, the projection
    rows = list(csv.DictReader(io.StringIO(as_csv(content))))
    assert [r["method"] for r in rows] == ["ours", "fedavg-lora", "central", "local"]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.71)
    assert rows[3]["sd"] == ""


def test_a_page_names_what_is_not_finished_instead_of_showing_an_empty_row(
    finished: tuple[Any, dict[str, Any]],
) -> None:
    content = finished[1]
    assert "Not finished" not in short_markdown(content)
    rows = [
        {**row, "accuracy": None} if row["method"] == "local" else row for row in content["methods"]
    ]
    text = short_markdown({**content, "methods": rows})
    assert "Not finished, and not in the table: local." in text
    assert "| local |" not in text.split("Every method")[0]
    assert "| ours |" in text


def test_the_page_says_how_long_it_took_and_which_runs_lack_devices(
    finished: tuple[Any, dict[str, Any]],
) -> None:
    content = finished[1]
    seconds = [recorded(n)["seconds"]["total"] for n in ("split", "fedavg-lora")]
    # of ours and central three grid points and two seeds, the first recorded as a split run
    runs = {n: sum(r["name"].startswith(n) for r in content["runs"]) for n in ("ours", "")}
    total = runs["ours"] * seconds[0] + (runs[""] - runs["ours"]) * seconds[1]
    text = markdown(content)
    assert f"{runs['']} federations" in text
    assert f"took {total / 60:.0f} minutes in all" in text
    assert "refused or were lost" not in text
    runs_then = [{**r, "left_out": 2 * r["name"].startswith("ours-x3")} for r in content["runs"]]
    text = short_markdown({**content, "runs": runs_then})
    named = ", ".join(f"ours-x3-seed{n} (2)" for n in range(3))
    assert f"Devices that refused or were lost: {named}." in text


def test_devices_that_did_not_take_part_are_counted(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, TWO)

    def lost(name: str, results: dict[str, Any]) -> None:
        if name.startswith("fedavg"):
            results["devices"]["quarantined"] = {"device-00001": "no reply in time"}
            results["devices"]["refused"] = {"device-00002": "refused: fit-rounds"}

    run(plan, Recorded(lost))
    counted = {r["name"]: r["left_out"] for r in summarise(plan, "")["runs"]}
    assert counted == {"ours-x1-seed0": 0, "fedavg-lora-x1-seed0": 2}


def test_outputs_are_written_whole_and_figures_drawn(
    finished: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    plan = finished[0]
    (plan.runs / "fedavg-lora-x3-seed0" / "inversion.json").write_text(json.dumps(INVERSION))
    options = command.CompareOptions(out=tmp_path / "small.json", figures=tmp_path / "figures")
    content = command.write_outputs(plan, options, "privtune compare small.toml")
    assert json.loads((tmp_path / "small.json").read_text()) == content
    page = (tmp_path / "small.md").read_text()
    assert "| 50.0 / 40.0 (30.0 / 20.0) |\n" in page
    # nobody was attacked without knowing the perturbation: no column of dashes
    assert "does not know the perturbation, %" not in page
    assert "| label perplexity |" in page
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "small.csv",
        "small.json",
        "small.md",
    ]
    drawn = {p.name: p.read_text() for p in (tmp_path / "figures").iterdir()}
    wanted = ("bytes", "seconds", "attack", "curves", "curves-bytes")
    assert set(drawn) == {f"small-{name}.svg" for name in wanted}
    assert "content words read by an attacker" in drawn["small-attack.svg"]
    for name in ("ours", "fedavg-lora", "central"):
        assert name in drawn["small-bytes.svg"]
    assert str(tmp_path) not in json.dumps(content)
    command.write_outputs(plan, options, "privtune compare small.toml")
    again = {p.name: p.read_text() for p in (tmp_path / "figures").iterdir()}
    assert again == drawn  # the same rows give the same bytes


def test_pruning_keeps_the_run_that_an_audit_attacks(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, 'methods = ["fedavg-lora"]\nseeds = [0, 1]\n' + GRID)
    run(plan, Recorded(by_multiplier))
    for name in ("x0.3-seed0", "x3-seed0", "x3-seed1"):
        folder = plan.runs / f"fedavg-lora-{name}"
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"w" * 100)
        (folder / "checkpoint.pt").write_bytes(b"c")
    command.prune_finished(plan)
    left = {p.parent.name for p in plan.runs.glob("*/checkpoint.pt")}
    assert left == {p.parent.name for p in plan.runs.glob("*/model")} == {"fedavg-lora-x3-seed0"}
    assert gather(plan, plan.methods[0]).chosen == 3.0


# ------------------------------------------------------------------------------------ command line


def privtune(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["compare", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_the_plan_is_listed_with_expected_minutes(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path, TWO + GRID + "seeds = [0, 1]\n")
    options = ("--runs", str(tmp_path / "runs"), "--plan")
    code, output = privtune(scenario, *options)
    assert code == 0
    assert "ours-x0.3-seed0" in output
    assert "2 more once learning rates are chosen" in output
    assert "6 of unknown length" in output
    plan = plan_from(tmp_path, TWO + GRID)
    run(plan, Recorded(), only="ours-x1-*")
    minutes = recorded("split")["seconds"]["total"] / 60
    _, output = privtune(scenario, *options, "--only", "ours*")
    assert f"about {minutes:.1f}" in output
    assert "fedavg-lora" not in output


def test_the_table_shows_what_is_finished_without_running(tmp_path: Path) -> None:
    scenario = write_scenario(tmp_path, TWO)
    run(plan_from(tmp_path, TWO), Recorded(), only="fedavg*")
    code, output = privtune(scenario, "--runs", str(tmp_path / "runs"), "--table")
    assert code == 0
    assert f"{100 * recorded('fedavg-lora')['final']['test_accuracy']:.1f}" in output
    assert (tmp_path / "runs" / "comparison.md").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--methods", "ours,nosuch"), "method 'nosuch': unknown"),
        (("--seeds", "0,x"), "--seeds 'x'"),
        (("--seeds", "-1"), "--seeds '-1'"),
    ],
)
def test_wrong_options_end_with_one_line(
    arguments: tuple[str, str], named: str, tmp_path: Path
) -> None:
    scenario = write_scenario(tmp_path, TWO)
    code, output = privtune(scenario, "--runs", str(tmp_path / "runs"), *arguments)
    assert code == 1
    assert output.startswith("privtune: ")
    assert named in output
    assert not (tmp_path / "runs").exists()
