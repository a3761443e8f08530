"""A comparison as text: Markdown, CSV, and the console's table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from privtune_flwr.compare.projection import SHOWN
from privtune_flwr.privacy.base import bound_words

Row = Mapping[str, Any]
NONE = "-"
_CSV = (
    "method",
    "family",
    "seeds",
    "accuracy",
    "sd",
    "perplexity",
    "perplexity_sd",
    "points_below_central",
    "bytes_up",
    "bytes_down",
    "messages",
    "model_bytes",
    "device_seconds",
    "device_peak_bytes",
    "cloud_seconds",
    "wall_seconds",
    "multiplier",
    "cloud_sees",
    "guarantee",
    "against",
    "attack_tokens",
    "attack_content",
    "floor_tokens",
    "floor_content",
    "unaware_tokens",
    "unaware_content",
    "failed",
)


def _number(value: float | None, digits: int = 1, factor: float = 1.0) -> str:
    return NONE if value is None else f"{value * factor:.{digits}f}"


def megabytes(value: float | None) -> str:
    """Write bytes as MB, with as many digits as matter."""
    if value is None:
        return NONE
    size = value / 1e6
    return f"{size:.3f}" if size < 0.1 else f"{size:.2f}" if size < 10 else f"{size:.0f}"


def seconds_words(value: float) -> str:
    """Write seconds with two digits that matter, whole ones from ten on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _accuracy(row: Row) -> str:
    if row["accuracy"] is None:
        return "failed" if row["failed"] else "to do"
    spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    return f"{100 * row['accuracy']:.1f}{spread}"


def _perplexity(row: Row) -> str:
    # not in files of before there was such a column
    mean, spread = row.get("perplexity"), row.get("perplexity_sd")
    return _number(mean, 3) + ("" if spread is None else f" ± {spread:.3f}")


def guarantee_words(found: Mapping[str, Any] | None) -> str:
    """Put a formal guarantee in a few words: epsilon, of what, and against whom."""
    if found is None:
        return NONE
    said = bound_words(found)
    if not said:
        return "none"
    against, learning = found["against"], found["learning"]
    whom = f" (against {against})" if against and against != "none" else ""
    earlier = ""
    if learning:
        bound = learning["epsilon"]
        earlier = "; its learning: " + ("no bound" if bound is None else f"epsilon {bound:.3g}")
    return f"{said}{whom}{earlier}"


def edge_words(content: Row) -> str:
    """Name the methods whose best rate is the grid's first or last: more may lie beyond."""
    named = []
    for row in content["methods"]:
        tried = [point["multiplier"] for point in row["grid"]]
        if len(tried) > 1 and row["multiplier"] in (min(tried), max(tried)):
            named.append(f"{row['method']} (x {row['multiplier']:g})")
    if not named:
        return ""
    return f"At an end of the grid, so that a rate beyond it may do better: {', '.join(named)}.\n"


def cost_words(content: Row) -> str:
    """Say how long all finished runs took, one after the other."""
    took = [run["seconds"] for run in content["runs"] if run.get("seconds") is not None]
    if not took:
        return ""
    return (
        f"{len(took)} federations, the grids' included, took {sum(took) / 60:.0f} minutes in all; "
        "--jobs shares them out.\n"
    )


def left_out_words(content: Row) -> str:
    """Name the runs that went on without some of their devices."""
    named = [f"{run['name']} ({run['left_out']})" for run in content["runs"] if run.get("left_out")]
    return f"Devices that refused or were lost: {', '.join(named)}.\n" if named else ""


def _read(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NONE
    return f"{_number(found['tokens'], 1, 100)} / {_number(found['content'], 1, 100)}"


def _read_by_all_knowing(row: Row) -> str:
    found = row["attack"]
    return NONE if found is None else f"{_read(found)} ({_read(found['floor'])})"


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda r: str(r["method"])),
    ("seeds", lambda r: str(len(r["seeds"]))),
    ("accuracy, %", _accuracy),
    ("points below central", lambda r: _number(r["points_below_central"])),
    ("label perplexity", _perplexity),
    ("MB up", lambda r: megabytes(r["bytes_up"])),
    ("MB down", lambda r: megabytes(r["bytes_down"])),
    ("model, MB", lambda r: megabytes(r["model_bytes"])),
    ("messages", lambda r: _number(r["messages"], 0)),
    ("device, s", lambda r: _number(r["device_seconds"])),
    ("device peak, MB", lambda r: _number(r["device_peak_bytes"], 0, 1e-6)),
    ("cloud, s", lambda r: _number(r["cloud_seconds"])),
    ("wall, s", lambda r: _number(r["wall_seconds"], 0)),
    ("the cloud sees", lambda r: str(r["cloud_sees"])),
    ("formal guarantee", lambda r: guarantee_words(r["guarantee"])),
    ("attacker reads tokens / content words (a blind guess), %", _read_by_all_knowing),
    (
        "one who does not know the perturbation, %",
        lambda r: _read((r["attack"] or {}).get("unaware")),
    ),
)


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def _known(
    columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]
) -> list[tuple[str, Callable[[Row], str]]]:
    """Leave out columns of which no row knows anything."""
    return [(n, cell) for n, cell in columns if any(cell(row) != NONE for row in rows)]


def main_table(rows: Sequence[Row]) -> str:
    """One row a method, a device's share of everything."""
    columns = _known(_COLUMNS, rows)
    return _markdown([n for n, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


#: What a README has room for; the rest stands in the comparison's own page.
_SHORT: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("method", lambda r: str(r["method"])),
    ("seeds", lambda r: str(len(r["seeds"]))),
    ("accuracy, %", _accuracy),
    ("MB up / down", lambda r: f"{megabytes(r['bytes_up'])} / {megabytes(r['bytes_down'])}"),
    ("device, s", lambda r: _number(r["device_seconds"])),
    ("the cloud sees", lambda r: str(r["cloud_sees"])),
    ("promised", lambda r: guarantee_words(r["guarantee"] and {**r["guarantee"], "against": None})),
    ("read, %: tokens / content words (a blind guess)", _read_by_all_knowing),
    (
        "by one who does not know the perturbation",
        lambda r: _read((r["attack"] or {}).get("unaware")),
    ),
)


def short_table(rows: Sequence[Row]) -> str:
    """One row a method, with what people decide by."""
    columns = _known(_SHORT, rows)
    return _markdown([n for n, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def against_words(rows: Sequence[Row]) -> str:
    """Say against whom each promise of :func:`short_table` holds."""
    held: dict[str, list[str]] = {}
    for row in rows:
        found = row["guarantee"]
        if found is not None and bound_words(found) and found["against"] not in (None, "none"):
            held.setdefault(found["against"], []).append(row["method"])
    if not held:
        return ""
    said = "; ".join(f"{', '.join(names)}: {whom}" for whom, names in held.items())
    return f"Promised against whom: {said}.\n"


def axis_title(axis: Row) -> str:
    """Say at what methods are equal, as ``at 1.2 MB (all of prompt)``."""
    amount = {
        "epochs": f"at {axis['budget']:g} epochs",
        "bytes": f"at {megabytes(axis['budget'])} MB a device",
        "seconds": f"at {seconds_words(axis['budget'])} s of a device",
    }[axis["axis"]]
    return amount + (f" (all of {axis['of']})" if axis["of"] and axis["axis"] != "epochs" else "")


def axes_table(content: Row) -> str:
    """Accuracy reached at equal epochs, bytes and device seconds."""
    axes = content["axes"]
    if not axes:
        return ""
    # the methods' own order: a stored file has its keys sorted
    names = [row["method"] for row in content["methods"] if row["method"] in axes[0]["accuracy"]]
    lines = [[n, *(_number(a["accuracy"].get(n), 1, 100) for a in axes)] for n in names]
    return _markdown(["method", *(axis_title(a) for a in axes)], lines)


def projection_table(content: Row) -> str:
    """Projected wall minutes on some of the links and devices."""
    slow = content["projection"]["slow"]
    head = ["method (projected minutes)"]
    for link, device, factor in SHOWN:
        head.append(f"{link}, {device}" + (f", one {slow:g}x slower" if factor > 1 else ""))
    lines = []
    for row in content["methods"]:
        found = row["projection"]
        if found is None:
            continue
        known = {(s["link"], s["device"], s["slow"]): s["seconds"] for s in found["seconds"]}
        lines.append([row["method"], *(_number(known.get(key), 1, 1 / 60) for key in SHOWN)])
    return _markdown(head, lines) if lines else ""


def grid_table(content: Row) -> str:
    """Every grid point's accuracy on the devices' evaluation examples; the chosen one is marked."""
    points = sorted({p["multiplier"] for row in content["methods"] for p in row["grid"]})
    lines = []
    for row in content["methods"]:
        found = {p["multiplier"]: p for p in row["grid"]}
        cells = []
        for point in points:
            known = found.get(point)
            if known is None:
                cells.append("")  # only methods whose best point was an end went there
                continue
            value = _number(known["eval_accuracy"], 1, 100)
            if known["state"] != "finished":
                value = known["state"]
            cells.append(f"**{value}**" if point == row["multiplier"] else value)
        rates = ", ".join(f"{key} {value:.3g}" for key, value in (row["rates"] or {}).items())
        lines.append([row["method"], *cells, rates or NONE])
    return _markdown(["method", *(f"x {p:g}" for p in points), "rates of the table's runs"], lines)


def _method_line(row: Row) -> str:
    settings = ", ".join(f"{key} = {value}" for key, value in row["settings"].items())
    return f"- {row['method']}: {row['title']}" + (f" ({settings})\n" if settings else "\n")


def failures(content: Row) -> list[str]:
    """List the runs that failed, with their reasons."""
    return [f"- {run['name']}: {run['reason']}" for run in content["runs"] if "reason" in run]


def markdown(content: Row) -> str:
    """Write the whole comparison out, figures apart."""
    scenario = content["scenario"]
    parts = [
        f"# {scenario['name']}\n\n{scenario['description']}\n",
        f"`{content['command']}`\n",
        main_table(content["methods"]),
        content["tuning"]["statement"] + "\n",
        edge_words(content),
        cost_words(content),
        left_out_words(content),
    ]
    if content["axes"]:
        parts += ["## At equal epochs, bytes and device seconds\n", axes_table(content)]
    projected = projection_table(content)
    if projected:
        parts += ["## Projected wall time\n", content["projection"]["statement"] + "\n", projected]
    parts += [
        "## Learning rates\n",
        "Accuracy on the devices' evaluation examples, %.\n",
        grid_table(content),
    ]
    failed = failures(content)
    if failed:
        parts += ["## Failed\n", "\n".join(failed) + "\n"]
    parts += [
        "## Methods\n",
        "".join(_method_line(row) for row in content["methods"]),
    ]
    parts += [
        "## Columns\n",
        "".join(f"- {name}: {said}\n" for name, said in content["definitions"].items()),
    ]
    return "\n".join(part for part in parts if part)


def short_markdown(content: Row) -> str:
    """Write what a README shows: what people decide by, and how it was tuned."""
    rows = [row for row in content["methods"] if row["accuracy"] is not None]
    lacking = [row["method"] for row in content["methods"] if row["accuracy"] is None]
    parts = [
        short_table(rows),
        f"Not finished, and not in the table: {', '.join(lacking)}.\n" if lacking else "",
        against_words(rows),
        content["tuning"]["statement"] + "\n",
        edge_words(content),
        cost_words(content),
        left_out_words(content),
    ]
    return "\n".join(part for part in parts if part)


def costs_markdown(content: Row) -> str:
    """Write what the rest of a results page shows: all columns, equal budgets, the projection."""
    rows = [row for row in content["methods"] if row["accuracy"] is not None]
    parts = [main_table(rows), axes_table(content), projection_table(content)]
    return "\n".join(part for part in parts if part)


def as_csv(content: Row) -> str:
    """Write one line a method, in the units of ``definitions``."""
    sink = io.StringIO()
    writer = csv.DictWriter(sink, _CSV, lineterminator="\n")
    writer.writeheader()
    for row in content["methods"]:
        found, read = row["guarantee"] or {}, row["attack"] or {}
        others = {name: read.get(name) or {} for name in ("floor", "unaware")}
        writer.writerow(
            {
                **{key: row[key] for key in _CSV if key in row},
                "seeds": " ".join(str(seed) for seed in row["seeds"]),
                "guarantee": "" if not found else guarantee_words({**found, "against": None}),
                "against": found.get("against") or "",
                "attack_tokens": read.get("tokens"),
                "attack_content": read.get("content"),
                **{f"{n}_{k}": v.get(k) for n, v in others.items() for k in ("tokens", "content")},
                "failed": " ".join(row["failed"]),
            }
        )
    return sink.getvalue()


def console_table(content: Row, axis: Row | None = None) -> Table:
    """Lay the comparison out for a terminal; with an axis, what is reached at its budget."""
    table = Table(title=content["scenario"]["name"])
    hidden = {"the cloud sees", "formal guarantee"}
    columns = [c for c in _known(_COLUMNS, content["methods"]) if c[0] not in hidden]
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "method" else "right")
    if axis is not None:
        table.add_column(f"accuracy {axis_title(axis)}, %", justify="right")
    for row in content["methods"]:
        cells = [cell(row) for _, cell in columns]
        if axis is not None:
            cells.append(_number(axis["accuracy"].get(row["method"]), 1, 100))
        table.add_row(*cells)
    return table
