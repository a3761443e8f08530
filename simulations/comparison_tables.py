"""The comparison under each condition as one Markdown table of the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# a scenario's stored result, and the column it makes
CONDITIONS = {
    "comparison": "devices alike",
    "comparison-dirichlet": "Dirichlet 0.1",
    "comparison-oneclass": "one class each",
    "comparison-sizes": "shares as 1 to 100",
    "comparison-hundred": "100 devices",
    "comparison-dropout": "30 % of replies lost",
    "comparison-slow": "slow devices",
    "comparison-topics": "news, five topics",
}


def conditions_table(contents: Mapping[str, dict[str, Any]]) -> str:
    """Hold each method's accuracy under one condition against the others'.

    Parameters
    ----------
    contents : Mapping
        Stored comparisons by scenario; those of ``CONDITIONS`` that are missing are left out.

    Returns
    -------
    str
        One line for each method that any of them but the first ran, in the first one's order;
        accuracy in percent, mean and spread where there are several seeds, a dash where the
        method was not run.
    """
    known = {name: title for name, title in CONDITIONS.items() if name in contents}
    rows = {n: {row["method"]: row for row in contents[n]["methods"]} for n in known}
    lines = [f"| method | {' | '.join(known.values())} |", "|---" * (1 + len(known)) + "|"]
    for method in rows["comparison"]:
        others = [n for n in known if n != "comparison"]
        if not any(_accuracy(rows[n].get(method)) for n in others):
            continue
        cells = [_accuracy(rows[name].get(method)) or "-" for name in known]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _accuracy(row: Mapping[str, Any] | None) -> str:
    if row is None or row["accuracy"] is None:
        return ""
    spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"
