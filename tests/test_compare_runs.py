"""Comparisons of recorded runs: which runs are started, and what becomes of what is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compare_kit import GRID, TWO, Recorded, by_multiplier, plan_from, run
from filelock import FileLock

from privtune_flwr.compare.outcome import failure_file, find_outcome, record_failure
from privtune_flwr.compare.runner import gather, known_runs
from privtune_flwr.compare.summary import summarise
from privtune_flwr.compare.table import markdown
from privtune_flwr.config import ConfigError
from privtune_flwr.errors import PROCESS_DIED, RunError


def test_a_comparison_runs_its_grids_then_its_seeds_and_never_twice(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, TWO + GRID + "seeds = [0, 1]\n")
    execute = Recorded(by_multiplier)
    assert run(plan, execute) == []
    grids = [f"{m}-x{p}-seed0" for m in ("ours", "fedavg-lora") for p in ("0.3", "1", "3")]
    assert execute.asked == [*grids, "ours-x3-seed1", "fedavg-lora-x3-seed1"]
    assert (plan.runs / "ours-x3-seed1.log").read_text() == "round 1/2\nround 2/2\n"
    again = Recorded()
    assert run(plan, again) == []
    assert again.asked == []


def test_a_grid_goes_on_while_its_best_point_is_an_end(tmp_path: Path) -> None:
    def inside(name: str, results: dict[str, Any]) -> None:
        """Let the devices like x 9 best, of all points there could be."""
        point = float(name.split("-x")[1].split("-")[0])
        results["final"] |= {"eval_accuracy": 0.9 - abs(point - 9) / 100, "test_accuracy": 0.5}

    one = 'methods = ["fedavg-lora"]\n' + GRID
    plan = plan_from(tmp_path, one + "grid-extensions = 3\nseeds = [0, 1]\n")
    execute = Recorded(inside)
    assert run(plan, execute) == []
    asked = [name.removeprefix("fedavg-lora-x") for name in execute.asked]
    assert asked == ["0.3-seed0", "1-seed0", "3-seed0", "9-seed0", "27-seed0", "9-seed1"]
    text = markdown(summarise(plan, "x"))
    assert "At an end" not in text
    assert "at most 3 times" in text

    # it stops where it was told to, and says that the best is an end
    other = tmp_path / "b"
    other.mkdir()
    plan = plan_from(other, one + "grid-extensions = 1\n")
    execute = Recorded(by_multiplier)
    run(plan, execute)
    assert execute.asked[-1] == "fedavg-lora-x9-seed0"
    assert len(execute.asked) == 4
    assert "fedavg-lora (x 9)" in markdown(summarise(plan, "x"))


def test_a_grid_goes_on_below(tmp_path: Path) -> None:
    def least(name: str, results: dict[str, Any]) -> None:
        point = float(name.split("-x")[1].split("-")[0])
        results["final"] |= {"eval_accuracy": 0.9 - point / 100, "test_accuracy": 0.5}

    one = 'methods = ["central"]\n' + GRID + "grid-extensions = 1\n"
    plan = plan_from(tmp_path, one)
    execute = Recorded(least)
    run(plan, execute)
    assert execute.asked[-1] == "central-x0.09-seed0"


def test_only_what_matches_is_run(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, TWO + GRID)
    execute = Recorded()
    run(plan, execute, only="fedavg-*-seed0")
    assert [n.partition("-x")[0] for n in execute.asked] == ["fedavg-lora"] * 3


def test_an_interrupted_run_goes_on_and_a_failed_one_is_tried_again(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, TWO)

    def broken(name: str, results: dict[str, Any]) -> None:
        if name.startswith("ours"):
            raise RuntimeError("no device came")

    first = Recorded(broken)
    assert run(plan, first) == ["ours-x1-seed0"]
    assert first.asked == ["ours-x1-seed0", "fedavg-lora-x1-seed0"]  # the others went on
    (ours, lora) = known_runs(plan)
    assert (ours.state, ours.reason, lora.state) == ("failed", "no device came", "finished")
    content = summarise(plan, "")
    assert content["methods"][0]["failed"] == {"ours-x1-seed0": "no device came"}
    assert content["methods"][0]["accuracy"] is None
    assert "no device came" in markdown(content)
    second = Recorded()
    assert run(plan, second) == []
    # inside the folder that the first try left
    assert second.asked == second.resumed == ["ours-x1-seed0"]
    assert not failure_file(plan, ours.run).exists()


@pytest.mark.parametrize(("deaths", "asked"), [(2, 3), (9, 3)])
def test_a_run_whose_machine_failed_it_is_resumed_at_once(
    deaths: int, asked: int, tmp_path: Path
) -> None:
    plan = plan_from(tmp_path, 'methods = ["ours"]\n')

    def mortal(name: str, results: dict[str, Any]) -> None:
        if len(execute.asked) <= deaths:
            raise RunError(f"{PROCESS_DIED} (out of memory?): 3 devices could not answer")

    execute = Recorded(mortal)
    assert run(plan, execute) == (["ours-x1-seed0"] if deaths >= asked else [])
    assert execute.asked == ["ours-x1-seed0"] * asked
    assert execute.resumed == ["ours-x1-seed0"] * (asked - 1)


def test_what_another_process_works_on_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privtune_flwr.compare.runner._POLL_SECONDS", 0.0)
    plan = plan_from(tmp_path, TWO + "seeds = [0, 1]\n")
    plan.runs.mkdir()
    theirs = FileLock(plan.runs / "ours-x1-seed0.lock")
    theirs.acquire()
    mine, looks = Recorded(), 0

    def others() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:  # the other one finishes its run, and is gone
            (first,) = plan.grid_runs(plan.methods[0])
            Recorded()(plan.config(first), lambda lines: None)
            theirs.release()
        return looks < 3

    assert run(plan, mine, others=others) == []
    # what its run made known is taken here, its run itself is not
    assert mine.asked == ["fedavg-lora-x1-seed0", "fedavg-lora-x1-seed1", "ours-x1-seed1"]


@pytest.mark.parametrize("failed", [True, False])
def test_what_another_process_left_is_taken_over_unless_it_failed(
    failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privtune_flwr.compare.runner._POLL_SECONDS", 0.0)
    plan = plan_from(tmp_path, 'methods = ["ours"]\n')
    plan.runs.mkdir()
    theirs = FileLock(plan.runs / "ours-x1-seed0.lock")
    theirs.acquire()
    mine, looks = Recorded(), 0

    def others() -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            if failed:
                record_failure(plan, plan.grid_runs(plan.methods[0])[0], "no device came")
            theirs.release()
        return looks < 2

    run(plan, mine, others=others)
    assert mine.asked == ([] if failed else ["ours-x1-seed0"])


def test_a_failed_grid_point_leaves_the_choice_to_the_others(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, 'methods = ["fedavg-lora"]\n' + GRID)

    def broken(name: str, results: dict[str, Any]) -> None:
        by_multiplier(name, results)
        if "x3" in name:
            raise RuntimeError("diverged")

    assert run(plan, Recorded(broken)) == ["fedavg-lora-x3-seed0"]
    found = gather(plan, plan.methods[0])
    assert found.chosen == 1.0
    assert "| failed |" in markdown(summarise(plan, ""))


def test_a_finished_run_of_another_configuration_is_no_row(tmp_path: Path) -> None:
    run(plan_from(tmp_path, TWO), Recorded())
    changed = plan_from(tmp_path, TWO + "[compare.settings.fedavg-lora]\nmodel.lora-rank = 4\n")
    assert find_outcome(changed, changed.grid_runs(changed.methods[0])[0]).state == "finished"
    with pytest.raises(ConfigError, match=r"model\.lora-rank = 4.*fedavg-lora-x1-seed0.*--runs"):
        summarise(changed, "")
