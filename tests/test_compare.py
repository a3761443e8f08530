"""Comparisons from recorded runs: plan, choice of the rate, figures, axes."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from compare_kit import plan_from, recorded, write_scenario

from privtune_flwr.compare import command
from privtune_flwr.compare.axis import accuracy_at, equal
from privtune_flwr.compare.measure import attack, curve, guarantee, measure
from privtune_flwr.compare.methods import METHODS
from privtune_flwr.compare.outcome import Outcome, best_end, choose
from privtune_flwr.compare.plan import PlannedRun
from privtune_flwr.compare.runner import known_runs, total_runs
from privtune_flwr.compare.table import axis_title, guarantee_words
from privtune_flwr.config import ConfigError
from privtune_flwr.scenario import load_scenario, packaged_scenarios

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
    assert rates["ours"] == pytest.approx(
        {
            body: 1.5e-4,
            head: 3e-3,
            # what the mechanism learns is tuned as much as the model is
            "privacy.learning.learning-rate": 4.5e-4,
            "privacy.learning.head-learning-rate": 1.5e-2,
        }
    )
    assert rates["fedavg"] == pytest.approx({body: 3e-5, head: 3e-3})
    assert rates["fedavg-lora"] == pytest.approx({body: 9e-3, head: 9e-3})
    assert rates["scaffold"][body] > 10 * rates["fedavg-lora"][body]  # SGD's, not AdamW's
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
    alike = ("comparison", *(f"comparison-{n}" for n in ("topics", "hundred", "dropout", "slow")))
    splits = dict.fromkeys(alike, "iid")
    skewed = {"oneclass": "column", "dirichlet": "dirichlet", "sizes": "size"}
    splits |= {f"comparison-{name}": kind for name, kind in skewed.items()}
    assert {n: s.run_config().data.partitioner for n, s in found.items()} == splits
    # all text in one place has no replies to lose; faults leave the best rates as they are
    faulty = {"comparison-dropout", "comparison-slow"}
    for name in found:
        plan = command.plan_of(name, command.CompareOptions(runs=tmp_path))
        methods = {m.name for m in plan.methods}
        assert methods >= {"ours", "split-clear", "fedavg-lora"}
        assert ("central" in methods) == (name not in faulty)
        assert len(plan.grid) == (1 if name in faulty else 3)
    main_study = found["comparison"].compare
    assert set(main_study.methods) == set(METHODS)
    several = set(main_study.methods) - set(main_study.single_seed)
    assert several >= {"ours", "fedavg", "fedavg-lora", "fedprox", "dp-fedavg", "splitfed"}
    assert len(main_study.seeds) == 3
    # the same study but for what each is about
    for name in splits:
        train = found["comparison"].run_config().train
        if name == "comparison-dropout":
            train = train.model_copy(update={"retries": 5})
        assert found[name].run_config().train == train
    assert found["comparison-oneclass"].run_config().data.partition_column == "label"
    assert found["comparison-dirichlet"].run_config().data.dirichlet_alpha == pytest.approx(0.1)
    assert found["comparison-hundred"].federation.num_supernodes == 100
    for name in ("dropout", "slow"):
        faults = load_scenario(name).run_config().simulation
        assert found[f"comparison-{name}"].run_config().simulation == faults


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


def test_a_grid_goes_on_only_where_an_end_is_better_than_its_neighbour() -> None:
    def grid(*accuracies: float) -> dict[float, Outcome]:
        points = (0.3, 1.0, 3.0)
        return {p: outcome(p, a) for p, a in zip(points, accuracies, strict=True)}

    assert best_end(grid(0.5, 0.6, 0.7)) == (3.0, 1.0)
    assert best_end(grid(0.7, 0.6, 0.5)) == (0.3, 1.0)
    assert best_end(grid(0.5, 0.7, 0.6)) is None
    # less loss alone says nothing about what lies beyond
    tied = {1.0: outcome(1.0, 0.7, loss=1.0), 3.0: outcome(3.0, 0.7, loss=0.5)}
    assert choose(tied) == 3.0
    assert best_end(tied) is None
    assert best_end({1.0: outcome(1.0, 0.7)}) is None


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


INVERSION = {
    "attack": "span",
    "token_recall": 0.5,
    "content_recall": 0.4,
    "floor": {"token_recall": 0.3, "content_recall": 0.2},
}


def test_attack_success_is_read_where_an_attacker_was_there(tmp_path: Path) -> None:
    assert attack(tmp_path) is None
    (tmp_path / "inversion.json").write_text(json.dumps(INVERSION))
    assert attack(tmp_path) == {
        "tokens": 0.5,
        "content": 0.4,
        "of": "distinct tokens",
        "by": "update inversion, span",
        "floor": {"tokens": 0.3, "content": 0.2},
        "unaware": None,
    }
    # nothing that was tried is not nothing that was read
    (tmp_path / "inversion.json").write_text(json.dumps(INVERSION | {"attack": "none"}))
    assert attack(tmp_path) is None
    audit = {
        "best": {"unaware": "a", "adaptive": "b"},
        "best_content": {"unaware": "a", "adaptive": "b"},
        "valid": True,
        "floors": {"constant": {"top1": {"value": 0.09}, "content_top1": {"value": 0.03}}},
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
    assert found["floor"] == {"tokens": 0.09, "content": 0.03}
    assert found["unaware"] == {"tokens": 0.1, "content": 0.05}
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


@pytest.mark.parametrize(
    ("axis", "budget", "said"),
    [
        ("seconds", 0.123, "at 0.12 s of a device (all of ours)"),
        ("seconds", 1.44, "at 1.4 s of a device (all of ours)"),
        ("seconds", 29.6, "at 30 s of a device (all of ours)"),
        ("bytes", 70_000, "at 0.070 MB a device (all of ours)"),
        ("epochs", 5.0, "at 5 epochs"),
    ],
)
def test_a_budget_is_said_with_the_digits_that_matter(axis: str, budget: float, said: str) -> None:
    assert axis_title({"axis": axis, "budget": budget, "of": "ours"}) == said
