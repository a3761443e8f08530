"""The inversion study as a picture: content words read, for each kind of update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: What is trained, and what the panel says of it. Rows that no attack is for are left out.
_TUNINGS = {
    "full": "all weights: updates",
    "lora": "adapters: updates",
    "splitfed": "SplitFed: rows of a round",
    "learning": "the default mechanism's learning phase: updates",
}


def draw_inversion(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the best attack's recall of content words, a panel a kind of tuning.

    Parameters
    ----------
    path : Path
        An SVG file; the same rows give the same bytes.
    rows : sequence of dict
        Of ``inversion.json``.
    """
    # Figure directly, not pyplot: no window system is needed
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    heights = [sum(r["tuning"] == t for r in rows) + 0.5 for t in _TUNINGS]
    figure = Figure(figsize=(9, 0.27 * sum(heights) + 2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(len(_TUNINGS), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    for axis, (tuning, title) in zip(axes, _TUNINGS.items(), strict=True):
        own = sorted((r for r in rows if r["tuning"] == tuning), key=_order)
        places = list(range(len(own)))
        recall = [100 * (r["content_recall"] or 0.0) for r in own]
        spread = [100 * (r["spread"]["content_recall"] or 0.0) for r in own]
        floor = [100 * (r["floor"]["content_recall"] or 0.0) for r in own]
        axis.barh(places, recall, xerr=spread, color="C0", height=0.6, label="best attack")
        axis.plot(floor, places, "|", color="C3", markersize=11, label="guessing common words")
        axis.set_yticks(places, [_label(r) for r in own], fontsize="small")
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize="medium")
    axes[-1].set_xlim(0, 105)
    axes[-1].set_xlabel("distinct content words of a device read by the cloud, % (recall)")
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    temporary = path.with_suffix(".tmp.svg")
    with rc_context({"svg.hashsalt": "inversion", "svg.fonttype": "none"}):
        figure.savefig(temporary, metadata={"Date": None})
    temporary.replace(path)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["optimizer"], row["batch"] or 10_000, row["round"], row["guard"]


def _label(row: dict[str, Any]) -> str:
    size = f"{row['batch']} sentence{'s' * (row['batch'] > 1)}" if row["batch"] else "whole round"
    parts = [row["optimizer"], size]
    later = row["round"] > 1
    if row["tuning"] == "lora":
        parts.append("adapters have moved" if later else "fresh adapters")
    elif row["tuning"] in ("splitfed", "learning"):
        parts[1] = "a later round" if later else "the first round"
    if row["tuning"] == "learning":
        parts.append("adapters" if "-lora-" in row["name"] else "whole blocks")
    if row["guard"] != "none":
        parts.append({"clip": "clipped", "dp-sgd": "DP-SGD, epsilon 8"}[row["guard"]])
    return ", ".join(parts)
