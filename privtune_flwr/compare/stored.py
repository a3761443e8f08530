"""A comparison that was stored before: adding rows to it, and never losing any unasked."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privtune_flwr.compare.methods import METHODS
from privtune_flwr.compare.plan import Plan
from privtune_flwr.compare.summary import FORMAT, hold_together
from privtune_flwr.config import ConfigError

#: What two comparisons must have alike for their rows to stand in one table.
_ALIKE = {"scenario": ("devices", "config"), "tuning": ("grid", "extensions", "seed")}


def read_stored(path: Path) -> dict[str, Any] | None:
    """Read a stored comparison; None where there is none.

    Raises
    ------
    ConfigError
        If the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "methods" not in content:
        raise ConfigError(f"--out {path}: is not a comparison; name another file")
    return content


def check_rows_survive(stored: Mapping[str, Any], plan: Plan, path: Path) -> None:
    """Refuse to write over rows that this comparison neither runs nor has the runs of.

    Raises
    ------
    ConfigError
        Naming them, and what can be done.
    """
    planned = {method.name for method in plan.methods}
    lost = [
        row["method"]
        for row in stored["methods"]
        if row["method"] not in planned and row["accuracy"] is not None and not _held(row, plan)
    ]
    if lost:
        raise ConfigError(
            f"--out {path}: has rows that are not in {plan.runs}: {', '.join(lost)}; --extend "
            "keeps them, or name another file"
        )


def extended(stored: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Add a comparison's rows to a stored one; a row that is in both is the new one, if finished.

    Parameters
    ----------
    stored, content : Mapping
        As in ``comparison.json``.
    path : Path
        Of the stored one, for a refusal.

    Returns
    -------
    dict
        A comparison with the rows of both, in the methods' own order, and the commands of both.

    Raises
    ------
    ConfigError
        If the two were not made of the same scenario and grid.
    """
    for part, keys in _ALIKE.items():
        for key in keys:
            if stored[part].get(key) != content[part][key]:
                raise ConfigError(
                    f"--extend: {path} was made with another {part}.{key}; name another --out"
                )
    rows = {row["method"]: row for row in stored["methods"]}
    for row in content["methods"]:
        if row["accuracy"] is not None or row["method"] not in rows:
            rows[row["method"]] = row
    taken = {m for m, row in rows.items() if any(row is r for r in content["methods"])}
    # of a method whose row is new, no run of an earlier start is left
    kept = [run for run in stored["runs"] if _method_of(run) not in taken]
    own = [run for run in content["runs"] if _method_of(run) in taken]
    commands = [c for c in stored["command"].split("; ") if c != content["command"]]
    found = copy.deepcopy(dict(content))
    found |= {
        "command": "; ".join([*commands, content["command"]]),
        "seeds": sorted({*stored["seeds"], *content["seeds"]}),
        "methods": [copy.deepcopy(rows[name]) for name in METHODS if name in rows],
        "runs": [*kept, *own],
    }
    hold_together(found)
    return found


def _held(row: Mapping[str, Any], plan: Plan) -> bool:
    names = [f"{row['method']}-x{row['multiplier']:g}-seed{seed}" for seed in row["seeds"]]
    return all((plan.runs / name / "results.json").is_file() for name in names)


def _method_of(run: Mapping[str, Any]) -> str:
    return str(run["name"]).rpartition("-seed")[0].rpartition("-x")[0]
