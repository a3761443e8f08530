"""From runs to ``comparison.json``: one row a method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from privtune_flwr.compare.axis import standard_axes
from privtune_flwr.compare.measure import Figures, attack, cloud_sees, guarantee, measure
from privtune_flwr.compare.methods import CENTRAL, METHODS, Method
from privtune_flwr.compare.outcome import Outcome
from privtune_flwr.compare.plan import Plan, changed_keys
from privtune_flwr.compare.projection import assumptions, project
from privtune_flwr.compare.runner import MethodOutcomes, gather, known_runs
from privtune_flwr.results.report import versions

FORMAT = 1
#: What each column of the table is, with its unit.
DEFINITIONS: dict[str, str] = {
    "accuracy": "share of the public test set after the last round; mean over seeds",
    "sd": "sample standard deviation of it over seeds; none with one seed",
    "perplexity": "exponential of the mean cross-entropy (nats) of the public test set's labels, "
    "after the last round: 1 = always sure and right, the number of classes = knows nothing; mean "
    "over seeds",
    "perplexity_sd": "sample standard deviation of it over seeds; none with one seed",
    "points_below_central": "percentage points below the central bound, mean over the seeds that "
    "both have",
    "bytes_up": "bytes a device sends for training, on average; Flower's serialised content; "
    "provisioning and evaluation are left out",
    "bytes_down": "bytes a device receives for training, likewise",
    "messages": "messages to a device for training, each with its reply",
    "model_bytes": "bytes a device must hold first: model parts and public artefacts, fetched once",
    "device_seconds": "processor seconds a device for training, all threads of its process",
    "device_peak_bytes": "largest resident memory of a device's process, the mean over seeds; "
    "a simulation's process serves several devices in turn",
    "cloud_seconds": "seconds by the clock that the cloud trains or averages, what it learns on "
    "public labels before that included, though later runs take it up; other work on the machine "
    "counts in",
    "wall_seconds": "seconds by the clock of all rounds in this simulation, tests left out",
    "cloud_sees": "what the cloud gets of a device",
    "guarantee": "epsilon (and delta), of what and against whom, or a bound in bits; None = none",
    "attack": "share of tokens, and of content words, that the best attack with knowledge of all "
    "but the secrets reads in what the cloud received: of positions in sentences where "
    "representations leave (audit.json), of a device's distinct tokens where updates do "
    "(inversion.json); floor: what guessing the commonest tokens blindly reads; unaware: what an "
    "attacker reads who does not know the perturbation, the paper's kind; None = not attacked, or "
    "no attack of ours is for it",
}
_MEANS = (
    "bytes_up",
    "bytes_down",
    "messages",
    "model_bytes",
    "device_seconds",
    "device_peak_bytes",
    "cloud_seconds",
    "wall_seconds",
)


def summarise(plan: Plan, command: str) -> dict[str, Any]:
    """Put a comparison together from the runs that are finished by now.

    Parameters
    ----------
    plan : Plan
    command : str
        What made it.
    """
    rows = [_row(plan, method.name, gather(plan, method)) for method in plan.methods]
    scenario = plan.scenario
    content: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "scenario": {
            "name": scenario.name,
            "description": scenario.description,
            "devices": scenario.federation.num_supernodes,
            "config": changed_keys(scenario.run_config()),
        },
        "tuning": {
            "grid": list(plan.grid),
            "extensions": plan.scenario.compare.grid_extensions,
            "seed": plan.grid_seed,
            "statement": tuning_statement(plan),
        },
        "seeds": list(plan.seeds),
        "definitions": DEFINITIONS,
        "methods": rows,
        "projection": assumptions(),
        "runs": [_run(outcome) for outcome in known_runs(plan)],
        "versions": versions(),
    }
    hold_together(content)
    return content


def hold_together(content: dict[str, Any]) -> None:
    """Work out, in place, what each row is only beside the others: central's, equal budgets."""
    rows = content["methods"]
    _hold_against_central(rows)
    content["axes"] = standard_axes([row for row in rows if row["accuracy"] is not None])


def tuning_statement(plan: Plan) -> str:
    """Say how learning rates were chosen."""
    if len(plan.grid) == 1:
        return (
            f"Every method ran at {plan.grid[0]:g} times its base learning rates; none was tuned."
        )
    points = ", ".join(f"{p:g}" for p in plan.grid)
    further = plan.scenario.compare.grid_extensions
    beyond = (
        f" Where an end was better than its neighbour, one beyond it was tried, at most "
        f"{further} times."
        if further
        else ""
    )
    return (
        f"Every method had the same grid: {points} times its base learning rates, with seed "
        f"{plan.grid_seed}.{beyond} The rate was chosen by accuracy on the devices' own evaluation "
        "examples, never by the test set; the other seeds ran at the rate that was chosen."
    )


def _row(plan: Plan, name: str, found: MethodOutcomes) -> dict[str, Any]:
    method = METHODS[name]
    done = [o for o in found.seeds if o.state == "finished" and o.results is not None]
    chosen = found.grid[found.chosen] if found.chosen is not None else None
    first = next(iter(found.grid.values())).run
    row: dict[str, Any] = {
        "method": name,
        "title": method.title,
        "family": method.family,
        "settings": {
            k: v
            for k, v in plan.settings(first).items()
            if k not in plan.rates(first) and k != "run.seed"
        },
        "grid": [_grid_point(o) for o in found.grid.values()],
        "multiplier": found.chosen,
        "rates": None if chosen is None else plan.rates(chosen.run),
        "failed": {
            o.run.name: o.reason
            for o in [*found.grid.values(), *found.seeds[1:]]
            if o.state == "failed"
        },
    }
    return row | _figures(plan, method, done)


def _figures(plan: Plan, method: Method, done: Sequence[Outcome]) -> dict[str, Any]:
    measured: list[tuple[Outcome, Figures]] = [(o, measure(o.results or {})) for o in done]
    by_seed = {o.run.seed: f.accuracy for o, f in measured if f.accuracy is not None}
    values = list(by_seed.values())
    perplexities = [f.perplexity for _, f in measured if f.perplexity is not None]
    results: Mapping[str, Any] = (done[0].results if done else None) or {}
    attacks = (attack(plan.runs / o.run.name) for o in done)
    return {
        "seeds": [o.run.seed for o in done],
        "accuracy": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "perplexity": _mean([f.perplexity for _, f in measured]),
        "perplexity_sd": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
        "accuracies": {str(seed): value for seed, value in by_seed.items()},
        "points_below_central": None,
        **{key: _mean([getattr(f, key) for _, f in measured]) for key in _MEANS},
        "cloud_sees": cloud_sees(method.sees, results),
        "guarantee": guarantee(results) if results else None,
        "attack": next((a for a in attacks if a is not None), None),
        "curves": [{"seed": o.run.seed, "points": f.points} for o, f in measured],
        # a bound has no federation that could take place on a link
        "projection": project(results, serial=method.serial)
        if results and method.family != "bound"
        else None,
    }


def _hold_against_central(rows: Sequence[dict[str, Any]]) -> None:
    central: dict[str, float] = next((r["accuracies"] for r in rows if r["method"] == CENTRAL), {})
    for row in rows:
        common = [seed for seed in row["accuracies"] if seed in central]
        if common:
            lost = [central[seed] - row["accuracies"][seed] for seed in common]
            row["points_below_central"] = 100 * statistics.fmean(lost)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _grid_point(outcome: Outcome) -> dict[str, Any]:
    known = outcome.state == "finished"
    return {
        "multiplier": outcome.run.multiplier,
        "state": outcome.state,
        "eval_accuracy": outcome.eval_accuracy if known else None,
        "eval_loss": outcome.eval_loss if known and outcome.eval_accuracy is not None else None,
    }


def _run(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.run.name,
        "state": outcome.state,
        "seconds": outcome.seconds,
        **({"left_out": _left_out(outcome.results)} if outcome.results else {}),
        **({"reason": outcome.reason} if outcome.state == "failed" else {}),
    }


def _left_out(results: Mapping[str, Any]) -> int:
    """Count the devices that refused or were quarantined: such a run is not quite the others'."""
    devices = results["devices"]
    return len({**devices["quarantined"], **devices["refused"]})
