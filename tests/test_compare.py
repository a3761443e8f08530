"""Comparisons from recorded runs: plan, choice of the rate, figures, axes, projection, outputs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from compare_kit import Recorded, plan_from, recorded, write_scenario
from rich.console import Console
from typer.testing import CliRunner

from privtune_flwr.cli import main
from privtune_flwr.compare import command
from privtune_flwr.compare.axis import accuracy_at, equal
from privtune_flwr.compare.measure import attack, curve, guarantee, measure
from privtune_flwr.compare.methods import METHODS
from privtune_flwr.compare.outcome import Outcome, choose, failure_file, find_outcome
from privtune_flwr.compare.plan import PlannedRun
from privtune_flwr.compare.projection import Link, Stage, predict, project, stages_of
from privtune_flwr.compare.runner import gather, known_runs, run_all, total_runs
from privtune_flwr.compare.summary import DEFINITIONS, summarise
from privtune_flwr.compare.table import as_csv, guarantee_words, markdown, short_markdown
from privtune_flwr.config import ConfigError
from privtune_flwr.scenario import load_scenario, packaged_scenarios

QUIET = Console(file=io.StringIO())
TWO = 'methods = ["ours", "fedavg-lora"]\n'
GRID = "grid = [0.3, 1, 3]\n"


def names(outcomes: list[Outcome]) -> list[str]:
    return [o.run.name for o in outcomes]


# -------------------------------------------------------------------------------------------- plan


def test_the_grid_comes_first_then_the_seeds_at_the_chosen_rate(tmp_path: Path) -> None:
    text = 'methods = ["ours", "fedavg"]\nseeds = [0, 1, 2]\nsingle-seed = ["fedavg"]\n' + GRID
    plan = plan_from(tmp_path, text)
    points = [f"{m}-x{p}-seed0" for m in ("ours", "fedavg") for p in ("0.3", "1", "3")]
    assert names(known_runs(plan)) == points
    assert total_runs(plan) == 8
    (ours, fedavg) = plan.methods
    assert [r.name for r in plan.seed_runs(ours, 3.0)] == ["ours-x3-seed1", "ours-x3-seed2"]
    assert plan.seed_runs(fedavg, 3.0) == []


def test_other_seeds_on_the_command_line_leave_the_choice_alone(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, TWO + "seeds = [0, 1, 2]\n", seeds=[2], methods=["fedavg-lora"])
    assert [m.name for m in plan.methods] == ["fedavg-lora"]
    assert plan.grid_seed == 0
    assert plan.seeds == (0, 2)


def test_a_multiplier_scales_the_base_rates_of_what_is_tuned(tmp_path: Path) -> None:
    text = (
        'methods = ["ours", "fedavg", "fedavg-lora", "scaffold", "fedadam", "prompt", "bbt"]\n'
        "grid = [3]\n[compare.rates.fedavg]\ntrain.learning-rate = 1e-5\n"
    )
    plan = plan_from(tmp_path, text)
    rates = {m.name: plan.rates(plan.grid_runs(m)[0]) for m in plan.methods}
    body, head = "train.learning-rate", "train.head-learning-rate"
    assert rates["ours"] == pytest.approx({body: 1.5e-4, head: 3e-3})
    assert rates["fedavg"] == pytest.approx({body: 3e-5, head: 3e-3})
    assert rates["fedavg-lora"] == pytest.approx({body: 3e-3, head: 3e-3})
    assert rates["scaffold"][body] > 100 * rates["fedavg-lora"][body]  # SGD's, not AdamW's
    assert set(rates["fedadam"]) == {body, head, "federated.server-learning-rate"}
    assert set(rates["prompt"]) == {"federated.prompt-learning-rate", head}
    assert set(rates["bbt"]) == {"federated.sigma"}
    config = plan.config(plan.grid_runs(plan.methods[1])[0])
    assert config.train.learning_rate == pytest.approx(3e-5)
    assert config.train.strategy == "fedavg"
    assert config.model.tuning == "full"
    assert config.run.min_devices == 4


def test_every_method_gives_a_valid_configuration(tmp_path: Path) -> None:
    plan = plan_from(tmp_path, f"methods = {json.dumps(list(METHODS))}\n")
    configs = {m.name: plan.config(plan.grid_runs(m)[0]) for m in plan.methods}
    assert configs["ours"].privacy.mechanism == "bottleneck"
    for name in ("split-clear", "sequential", "splitfed"):
        assert configs[name].privacy.mechanism == "none"
    assert configs["dp-sgd"].federated.example_privacy == "dp-sgd"
    assert configs["scaffold"].train.optimizer == "sgd"
    assert configs["scaffold"].federated.scaffold_learning_rate == 1.0
    assert (configs["prompt"].model.tuning, configs["central-full"].model.tuning) == (
        "prompt",
        "full",
    )


def test_settings_of_a_method_reach_its_runs_only(tmp_path: Path) -> None:
    text = 'methods = ["fedprox", "fedavg-lora"]\n[compare.settings.fedprox]\n'
    plan = plan_from(tmp_path, text + '"federated.proximal-mu" = 0.5\nmodel.lora-rank = 4\n')
    prox, plain = (plan.config(plan.grid_runs(m)[0]) for m in plan.methods)
    assert (prox.federated.proximal_mu, prox.model.lora_rank) == (0.5, 4)
    assert (plain.federated.proximal_mu, plain.model.lora_rank) == (0.01, 8)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('methods = ["our"]\n', ["compare.methods", "'our'", "fedavg-lora"]),
        ("grid = [1, -1]\n", ["compare.grid", "above 0"]),
        ("grid = []\n", ["compare.grid", "at least one"]),
        ("grid = [1, 1]\n", ["compare.grid", "twice"]),
        ("seeds = [-1]\n", ["compare.seeds", "[-1]"]),
        ("seeds = []\n", ["compare.seeds", "at least one"]),
        ('single-seed = ["scaffold"]\n', ["single-seed", "'scaffold'"]),
        ("epochs = 1\n", ["compare.epochs", "unknown key", "single-seed"]),
        ("[compare.rates.ours]\ntrain.epochs = 2\n", ["rates.ours.train.epochs", "allowed"]),
        ("[compare.rates.ours]\ntrain.learning-rate = 0.0\n", ["must be a number above 0"]),
        ("[compare.rates.nosuch]\na = 2\n", ["'nosuch'", "allowed"]),
        ("[compare.settings.ours]\nrun.seed = 2\n", ["settings.ours.run.seed"]),
        ("[compare.settings.ours]\ntrain.learning-rate = 1.0\n", ["rates.ours"]),
    ],
)
def test_a_wrong_comparison_names_the_key(text: str, named: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario(write_scenario(tmp_path, text))
    for part in named:
        assert part in str(caught.value)


def test_a_setting_that_is_no_key_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.ranks"):
        plan_from(tmp_path, TWO + "[compare.settings.ours]\nmodel.ranks = 4\n")


def test_a_scenario_that_sets_a_learning_rate_is_refused(tmp_path: Path) -> None:
    path = Path(write_scenario(tmp_path, TWO))
    path.write_text(path.read_text().replace("threads = 1", "learning-rate = 1e-3"))
    with pytest.raises(ConfigError, match=r"config\.train\.learning-rate.*compare\.rates"):
        command.plan_of(str(path), command.CompareOptions())


def test_packaged_comparisons_are_as_the_study_needs_them(tmp_path: Path) -> None:
    found = {n: load_scenario(n) for n in packaged_scenarios() if n.startswith("comparison")}
    assert set(found) == {"comparison", "comparison-topics", "comparison-oneclass"}
    for name in found:
        plan = command.plan_of(name, command.CompareOptions(runs=tmp_path))
        assert "central" in {m.name for m in plan.methods}
        assert len(plan.grid) > 1
    main_study = found["comparison"].compare
    assert set(main_study.methods) == set(METHODS)
    several = set(main_study.methods) - set(main_study.single_seed)
    assert several >= {"ours", "fedavg", "fedavg-lora", "fedprox", "dp-fedavg", "splitfed"}
    assert len(main_study.seeds) == 3
    data = found["comparison-oneclass"].run_config().data
    assert (data.partitioner, data.partition_column) == ("column", "label")


# ------------------------------------------------------------------------------ choice of the rate


def outcome(point: float, accuracy: float | None, loss: float = 1.0, test: float = 0.5) -> Outcome:
    run = PlannedRun(METHODS["fedavg"], point, 0)
    final: dict[str, Any] = {"test_accuracy": test}
    if accuracy is not None:
        final |= {"eval_accuracy": accuracy, "eval_loss": loss}
    return Outcome(run, "finished", {"final": final})


def test_the_rate_is_chosen_by_the_devices_and_not_by_the_test_set() -> None:
    grid = {0.3: outcome(0.3, 0.8, test=0.6), 1.0: outcome(1.0, 0.7, test=0.9)}
    assert choose(grid) == 0.3


def test_ties_go_to_the_lower_loss_then_to_the_base_rate() -> None:
    assert choose({0.3: outcome(0.3, 0.8, 0.5), 1.0: outcome(1.0, 0.8, 0.6)}) == 0.3
    tied = {p: outcome(p, 0.8, 0.5) for p in (0.3, 1.0, 3.0)}
    assert choose(tied) == 1.0


def test_nothing_is_chosen_before_the_whole_grid_was_tried() -> None:
    run = PlannedRun(METHODS["fedavg"], 3.0, 0)
    done = outcome(1.0, 0.8)
    for state in ("to do", "interrupted"):
        assert choose({1.0: done, 3.0: Outcome(run, state)}) is None  # type: ignore[arg-type]
    assert choose({1.0: done, 3.0: Outcome(run, "failed")}) == 1.0
    assert choose({3.0: Outcome(run, "failed")}) is None


def test_without_evaluation_examples_only_a_single_point_can_be_chosen() -> None:
    assert choose({1.0: outcome(1.0, None), 3.0: outcome(3.0, None)}) is None
    assert choose({3.0: outcome(3.0, None)}) == 3.0


# ------------------------------------------------------------------------------- one run's figures


def test_figures_are_a_device_s_share_of_training() -> None:
    """Against the accounts of the single devices, added up in another way."""
    for name in ("split", "fedavg-lora"):
        results = recorded(name)
        accounts = results["traffic"]["devices"].values()
        found = measure(results)
        for key, ours in (("up", found.bytes_up), ("down", found.bytes_down)):
            left = [
                a[key] - a.get(f"provision_{key}", 0) - a.get(f"evaluate_{key}", 0)
                for a in accounts
            ]
            assert ours == pytest.approx(statistics.fmean(left))
        assert found.points[-1]["accuracy"] == found.accuracy == results["final"]["test_accuracy"]
        # the last record's cumulative bytes are the run's
        total = found.bytes_up + found.bytes_down
        assert found.points[-1]["bytes"] == pytest.approx(total)
        assert found.points[-1]["seconds"] == pytest.approx(found.device_seconds)
        assert 0 < found.wall_seconds < results["seconds"]["total"]
        assert found.model_bytes is not None
        assert found.model_bytes > 1e6


def test_device_seconds_count_every_stage_of_split_tuning() -> None:
    seconds = recorded("split")["seconds"]
    assert seconds["learn"] > 0
    total = sum(seconds[k] for k in ("bottom", "mechanism", "codec", "learn"))
    assert measure(recorded("split")).device_seconds == pytest.approx(total / 4)


def test_release_rounds_share_the_first_epoch() -> None:
    """Two release rounds with half of the text each, then two passes; learning is no epoch."""
    points = curve(recorded("split"))
    assert [p["epoch"] for p in points] == [0.5, 1.0, 2.0, 3.0]
    learn = [r for r in recorded("split")["per_round"] if r["kind"] == "learn"]
    assert len(learn) == 2
    assert points[0]["bytes"] > learn[-1]["bytes"] / 4
    # once all is released, epochs cost a device nothing
    assert points[1]["bytes"] == points[-1]["bytes"]
    assert points[1]["seconds"] == points[-1]["seconds"]


def test_a_baseline_s_round_is_as_many_epochs_as_devices_make() -> None:
    results = recorded("fedavg-lora")
    assert [p["epoch"] for p in curve(results)] == [1.0, 2.0, 3.0]
    results["config"]["train.epochs"] = 6
    assert [p["epoch"] for p in curve(results)] == [2.0, 4.0, 6.0]
    spent = [p["bytes"] for p in curve(results)]
    assert spent == sorted(set(spent))


def test_guarantees_in_words() -> None:
    assert guarantee_words(guarantee(recorded("fedavg-lora"))) == "none"
    ours = guarantee_words(guarantee(recorded("split")))
    assert ours.startswith("8 bits a token (against ")
    assert ours.endswith("its learning: no bound")
    privacy = {"epsilon": 8.0, "delta": 1e-5, "adversary": "everybody"}
    said = guarantee_words(guarantee({"privacy": privacy}))
    assert said == "epsilon 8, delta 1e-05 per example (against everybody)"
    said = guarantee_words(guarantee({"privacy": {**privacy, "unit": "device"}}))
    assert "per device" in said


INVERSION = {"attack": "span", "token_recall": 0.5, "content_recall": 0.4}


def test_attack_success_is_read_where_an_attacker_was_there(tmp_path: Path) -> None:
    assert attack(tmp_path) is None
    (tmp_path / "inversion.json").write_text(json.dumps(INVERSION))
    assert attack(tmp_path) == {
        "tokens": 0.5,
        "content": 0.4,
        "of": "distinct tokens",
        "by": "update inversion, span",
    }
    audit = {
        "best": {"unaware": "a", "adaptive": "b"},
        "best_content": {"unaware": "a", "adaptive": "b"},
        "valid": True,
        "attacks": [
            {"key": k, "measures": {"top1": {"value": t}, "content_top1": {"value": c}}}
            for k, t, c in (("a", 0.1, 0.05), ("b", 0.3, 0.2))
        ],
    }
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit))
    found = attack(tmp_path)
    assert found is not None
    assert (found["tokens"], found["content"]) == (0.3, 0.2)
    # an audit that missed a planted leak says nothing
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit | {"valid": False}))
    assert attack(tmp_path) is None


# -------------------------------------------------------------------------------------------- axes

POINTS = [
    {"epoch": float(e), "accuracy": a, "bytes": 10.0 * e, "seconds": 2.0 * e}
    for e, a in ((1, 0.5), (2, 0.8), (3, 0.7))
]


def row(method: str, *curves: list[dict[str, float]], family: str = "federated") -> dict[str, Any]:
    listed = [{"seed": n, "points": points} for n, points in enumerate(curves)]
    return {"method": method, "family": family, "curves": listed, "accuracy": 0.9}


def test_the_last_point_within_the_budget_counts() -> None:
    assert accuracy_at(POINTS, "bytes", 20) == 0.8
    assert accuracy_at(POINTS, "bytes", 29.9) == 0.8
    assert accuracy_at(POINTS, "bytes", 1e9) == 0.7  # the last one, not the best one
    assert accuracy_at(POINTS, "bytes", 9.9) is None


def test_the_least_total_is_the_budget_but_not_a_bound_s() -> None:
    cheap = [{**p, "bytes": p["bytes"] / 4} for p in POINTS]
    free = [{**p, "bytes": 0.0} for p in POINTS]
    rows = [row("fedavg", POINTS), row("prompt", cheap), row("local", free, family="bound")]
    found = equal(rows, "bytes")
    assert found is not None
    assert (found["budget"], found["of"]) == (7.5, "prompt")
    assert found["accuracy"] == {"fedavg": None, "prompt": 0.7, "local": 0.7}
    given = equal(rows, "bytes", 10)
    assert given is not None
    assert given["accuracy"]["fedavg"] == 0.5


def test_equal_epochs_are_the_fewest_that_all_made() -> None:
    found = equal([row("fedavg", POINTS), row("ours", POINTS[:2])], "epochs")
    assert found is not None
    assert (found["budget"], found["accuracy"]["fedavg"]) == (2.0, 0.8)


def test_a_method_must_reach_the_budget_with_every_seed() -> None:
    late = [{**p, "seconds": p["seconds"] + 100} for p in POINTS]
    found = equal([row("fedavg", POINTS, late)], "seconds", 6)
    assert found is not None
    assert found["accuracy"] == {"fedavg": None}
    both = equal([row("fedavg", POINTS, POINTS[:2])], "seconds", 6)
    assert both is not None
    assert both["accuracy"]["fedavg"] == pytest.approx(0.75)


def test_a_bound_without_a_cost_is_given_at_its_end() -> None:
    bare = [{k: v for k, v in p.items() if k != "bytes"} for p in POINTS]
    found = equal([row("fedavg", POINTS), row("central", bare, family="bound")], "bytes", 10)
    assert found is not None
    assert found["accuracy"]["central"] == 0.9


# -------------------------------------------------------------------------------------- projection

LINK = Link(up=8e6, down=16e6, round_trip=0.1)


def stage(kind: str, compute: float, cloud: float) -> Stage:
    """Send 3 MB, receive 4 MB and exchange 5 messages: 3 + 2 + 0.5 seconds on LINK."""
    return Stage(kind, compute, 3e6, 4e6, 5, cloud)  # type: ignore[arg-type]


def test_a_synchronous_round_waits_for_compute_and_both_ways() -> None:
    assert predict([stage("sync", 2, 1)], LINK, 1) == pytest.approx(2 + 5.5 + 1)
    assert predict([stage("sync", 2, 1)] * 2, LINK, 4) == pytest.approx(2 * (8 + 5.5 + 1))
    # a slow device computes slower, its link is the others'
    assert predict([stage("sync", 2, 1)], LINK, 4, slow=5) == pytest.approx(40 + 5.5 + 1)


def test_the_release_overlaps_with_training() -> None:
    device = 1 + 5.5
    quick, slow = stage("release", 1, 1), stage("release", 1, 100)
    assert predict([quick] * 3, LINK, 1) == pytest.approx(3 * device + 1)
    assert predict([slow] * 3, LINK, 1) == pytest.approx(device + 300)
    mixed = [stage("sync", 1, 1), slow, quick, stage("cloud", 0, 7)]
    # the round after the slow one's training waits for it; then the cloud is alone
    assert predict(mixed, LINK, 1) == pytest.approx((device + 1) + device + 100 + 1 + 7)


def test_the_stages_of_a_real_run_hold_all_that_it_measured() -> None:
    for name in ("split", "fedavg-lora"):
        results = recorded(name)
        stages = stages_of(results)
        assert stages is not None
        found = measure(results)
        assert sum(s.bytes_up for s in stages) == pytest.approx(found.bytes_up)
        assert sum(s.messages for s in stages) == pytest.approx(found.messages)
        assert sum(s.compute for s in stages) == pytest.approx(found.device_seconds)
        assert sum(s.cloud for s in stages) == pytest.approx(found.cloud_seconds)
    kinds = [s.kind for s in stages_of(recorded("split")) or []]
    assert kinds == ["sync", "sync", "release", "release", "cloud", "cloud"]


def test_a_projection_says_that_it_is_one() -> None:
    found = project(recorded("fedavg-lora"))
    assert found is not None
    assert found["projected"] is True
    known = {(s["link"], s["device"], s["slow"]): s["seconds"] for s in found["seconds"]}
    assert known["LTE", "phone", 1.0] > known["home", "phone", 1.0] > known["LAN", "phone", 1.0]
    assert known["LAN", "phone", 5.0] > known["LAN", "phone", 1.0]
    held = recorded("fedavg-lora")["traffic"]["model_bytes"]
    assert found["model_seconds"]["LTE"] == pytest.approx(8 * held / 20e6)
    # one after the other, one in four is slow; together, all wait for it
    serial = project(recorded("fedavg-lora"), serial=True)
    assert serial is not None
    slowed = {(s["link"], s["device"], s["slow"]): s["seconds"] for s in serial["seconds"]}
    assert slowed["LAN", "phone", 5.0] < known["LAN", "phone", 5.0]
    assert slowed["LAN", "phone", 1.0] == known["LAN", "phone", 1.0]


def test_a_run_whose_records_lack_bytes_is_not_projected() -> None:
    results = recorded("fedavg-lora")
    del results["per_round"][1]["bytes_up"]
    assert project(results) is None


# --------------------------------------------------------------------------------- running, resume


def run(plan: Any, execute: Recorded, **options: Any) -> list[str]:
    return run_all(plan, execute=execute, after=lambda: None, console=QUIET, **options)


def by_multiplier(name: str, results: dict[str, Any]) -> None:
    """Let the devices prefer x 3; the test set prefers x 0.3."""
    point = float(name.split("-x")[1].split("-")[0])
    results["final"] |= {"eval_accuracy": 0.5 + point / 10, "test_accuracy": 0.9 - point / 10}


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


# ----------------------------------------------------------------------------------------- outputs


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
    for line in short_markdown(content).splitlines():
        assert not line.startswith("#")
    rows = list(csv.DictReader(io.StringIO(as_csv(content))))
    assert [r["method"] for r in rows] == ["ours", "fedavg-lora", "central", "local"]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.71)
    assert rows[3]["sd"] == ""


def test_outputs_are_written_whole_and_figures_drawn(
    finished: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    plan = finished[0]
    (plan.runs / "fedavg-lora-x3-seed0" / "inversion.json").write_text(json.dumps(INVERSION))
    options = command.CompareOptions(out=tmp_path / "small.json", figures=tmp_path / "figures")
    content = command.write_outputs(plan, options, "privtune compare small.toml")
    assert json.loads((tmp_path / "small.json").read_text()) == content
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
