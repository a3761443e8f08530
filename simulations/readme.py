"""Puts stored results into the pages that show them: ``python -m simulations.readme``.

No figure in a table of the README or of ``docs/results.md`` is typed by hand; a test renders both
again and compares.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privtune_flwr.compare.table import costs_markdown, short_markdown
from simulations.audit_tables import attribute_table, family_table, recovery_table
from simulations.comparison_tables import CONDITIONS, conditions_table
from simulations.frontier.tables import TABLES as FRONTIER
from simulations.headline import table
from simulations.study import RESULTS

ROOT = Path(__file__).parent.parent


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def headline() -> str:
    """Accuracy and recovery of each release."""
    return table(_load("headline.json")["rows"])


def transport() -> str:
    """Training time, messages and bytes of three transports."""
    content = _load("transport.json")
    lines = [
        "| transport | training, s | messages | kB up an example | kB down an example | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["comparison"]:
        lines.append(
            f"| {row['name']} | {row['training_seconds']:.0f} | {row['messages']} "
            f"| {row['bytes_up_per_example'] / 1e3:.1f} "
            f"| {row['bytes_down_per_example'] / 1e3:.2f} | {row['accuracy']:.4f} |"
        )
    lines += ["", "Ratios and differences of these runs (seed 0):", ""]
    lines += [f"- {name}: {value:.3f}" for name, value in content["ratios"].items()]
    alone = content["one_process_accuracy"]
    once = [r["final"]["test_accuracy"] for r in _variant("none")]
    lines += [
        "",
        f"Accuracy over seeds 0 to {len(alone) - 1}: one process {statistics.fmean(alone):.4f}, "
        f"the federation with `none` (the README's first table) {statistics.fmean(once):.4f}.",
    ]
    return "\n".join(lines) + "\n"


def _variant(name: str) -> list[dict[str, Any]]:
    return [r for r in _load("headline.json")["rows"] if r["name"].startswith(f"{name}-seed")]


def scale() -> str:
    """Driver memory with few and with many devices."""
    lines = [
        "| devices | a round | driver peak, MB | store, MB | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in _load("scale.json")["rows"]:
        lines.append(
            f"| {row['devices_used']} | {row['devices_a_round']} "
            f"| {row['memory']['driver_peak_bytes'] / 1e6:.0f} | {row['store_bytes'] / 1e6:.0f} "
            f"| {row['seconds']['total']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def audited() -> str:
    """Give what attackers read from each release."""
    references = _load("references.json")["rows"]
    return recovery_table(_load("audited.json")["rows"], _load("headline.json")["rows"], references)


def families() -> str:
    """Hold the best of each family of attacks at each level against each other."""
    return family_table(_load("audited.json")["rows"])


def attributes() -> str:
    """Give how often the author of a tweet is inferred from rows."""
    return attribute_table(_load("audited.json")["rows"])


def _of_frontier(make: Callable[[list[dict[str, Any]]], str]) -> Callable[[], str]:
    return lambda: make(_load("frontier.json")["rows"])


def device_cost() -> str:
    """Give what a sentence costs a device."""
    lines = [
        "| mechanism | cut | bottom model, ms | mechanism, ms | ratio | artefact, MB "
        "| peak memory, MB | set-up, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _load("device_cost.json")["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['name']} | {row['cut']} | {row['skipped']} | | | | | |")
            continue
        setup = f"{row['setup_seconds']:.0f}" if "setup_seconds" in row else ""
        lines.append(
            f"| {row['name']} | {row['cut']} | {row['bottom_ms']:.2f} | {row['mechanism_ms']:.2f} "
            f"| {row['ratio']:.2f} | {row['artefact_bytes'] / 1e6:.1f} "
            f"| {row['peak_memory_bytes'] / 1e6:.0f} | {setup} |"
        )
    return "\n".join(lines) + "\n"


def comparison() -> str:
    """Hold split tuning against federated baselines and bounds; says so where it was not run."""
    if not (RESULTS / "comparison.json").exists():
        return "Not run yet: `make compare`.\n"
    return short_markdown(_load("comparison.json"))


def comparison_costs() -> str:
    """Give all columns of the comparison, what is reached at equal budgets, and the projection."""
    return costs_markdown(_load("comparison.json"))


def conditions() -> str:
    """Give accuracy under each condition that the comparison was stored for."""
    stored = [name for name in CONDITIONS if (RESULTS / f"{name}.json").exists()]
    return conditions_table({name: _load(f"{name}.json") for name in stored})


def inversion() -> str:
    """Say what the best attack read from each kind of update."""
    if not (RESULTS / "inversion.json").exists():
        return "Not run yet: `python -m simulations.inversion`.\n"
    lines = [
        "| update | best attack | tokens, recall/precision % | content words | floor: tokens | "
        "floor: content words |",
        "|---|---|---|---|---|---|",
    ]
    rows = _load("inversion.json")["rows"]
    missed = sorted({row["tuning"] for row in rows if row["attack"] == "none"})
    for row in (row for row in rows if row["attack"] != "none"):
        cells = [row["name"], row["attack"]]
        for source, kinds in ((row, ("token", "content")), (row["floor"], ("token", "content"))):
            for kind in kinds:
                pair = (source.get(f"{kind}_{what}") for what in ("recall", "precision"))
                cells.append("/".join("-" if v is None else f"{100 * v:.0f}" for v in pair))
        lines.append(f"| {' | '.join(cells)} |")
    if missed:
        lines += ["", f"No attack here reads updates of: {', '.join(missed)} (left out)."]
    return "\n".join(lines) + "\n"


_TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "transport": transport,
    "scale": scale,
    "audited": audited,
    "families": families,
    "attributes": attributes,
    "device-cost": device_cost,
    "comparison": comparison,
    "comparison-costs": comparison_costs,
    "conditions": conditions,
    "inversion": inversion,
    **{name: _of_frontier(make) for name, make in FRONTIER.items()},
}
#: Page to its tables, in order.
PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("comparison", "conditions", "headline"),
    "docs/results.md": (
        *FRONTIER,
        "device-cost",
        "audited",
        "families",
        "attributes",
        "transport",
        "scale",
        "comparison-costs",
        "inversion",
    ),
}


def render(text: str, page: str) -> str:
    """Replace what stands between ``<!-- name -->`` and its closing mark by stored results.

    Raises
    ------
    ValueError
        If the page's marks are not those of :data:`PAGES`.
    """
    marks = set(re.findall(r"<!-- ([a-z-]+) -->", text))
    if marks != set(PAGES[page]):
        raise ValueError(f"{page}: has places for {sorted(marks)}, not {sorted(PAGES[page])}")
    for name in PAGES[page]:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        made = _TABLES[name]()
        text = pattern.sub(lambda found, made=made: found[1] + made + found[2], text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text(encoding="utf-8"), page), encoding="utf-8")
