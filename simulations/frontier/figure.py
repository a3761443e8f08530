"""The frontier as a picture: accuracy against what an attacker who knows everything reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.frontier.cases import MAIN

_MARKERS = "oshvD^P*X<>pdH8"


def draw_frontier(path: Path, rows: Sequence[dict[str, Any]], source: str = MAIN) -> None:
    """Draw accuracy against adaptive recovery of content words, a marker a mechanism.

    Parameters
    ----------
    path : Path
        An SVG file; the same rows give the same bytes.
    rows : sequence of dict
        Of ``frontier.json``; those judged by the test set that an attacker looked at are drawn.
    source : str
        Whose rows.
    """
    # Figure directly, not pyplot: no window system is needed
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    points = _points(rows, source)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasSVG(figure)
    axis = figure.subplots()
    mechanisms = sorted({mechanism for mechanism, _, _ in points})
    for number, mechanism in enumerate(mechanisms):
        own = [(x, y) for m, x, y in points if m == mechanism]
        axis.plot(
            *zip(*own, strict=True),
            _MARKERS[number % len(_MARKERS)],
            color=f"C{number % 10}",
            label=mechanism,
            alpha=0.8,
        )
    clean = [y for m, _, y in points if m == "none"]
    if clean:
        axis.axhline(max(clean), color="0.85", linewidth=0.8, zorder=0)
    axis.set_xlabel(
        "content words read by the strongest attacker (knows the mechanism, has similar text), %"
    )
    axis.set_ylabel("accuracy on the test set, %")
    axis.set_xlim(-3, 103)
    axis.set_title(f"{source}: up is more useful, left is more private")
    if points:
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_suffix(".tmp.svg")
    with rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none"}):
        figure.savefig(temporary, metadata={"Date": None})
    temporary.replace(path)


def _points(rows: Sequence[dict[str, Any]], source: str) -> list[tuple[str, float, float]]:
    found = []
    for row in rows:
        levels = row.get("recovered") or {}
        read = [levels[k]["content_top1"] for k in ("adaptive", "in-domain") if k in levels]
        known = [value for value in read if value is not None]
        if row["source"] == source and row["scored"] == "test" and known:
            found.append((row["mechanism"], 100 * max(known), 100 * row["accuracy"]))
    return found
