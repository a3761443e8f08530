"""Figures of the page: SVG that takes its colours and type from the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from privtune_flwr.audit.report.view import value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in these and replaced by the page's variables, so that a figure follows light and dark.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--leak)",
    "#050505": "var(--calm)",
    "#060606": "var(--surface)",
}
_INK, _MUTED, _LINE, _LEAK, _CALM, _SURFACE = _COLOURS
_Tag = tuple[int, float, float]  # number of a run, its rightmost share, its accuracy; in percent
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.5,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def frontier_figure(points: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw accuracy against recovery: two marks a run, joined, numbered as in the table.

    Parameters
    ----------
    points : sequence of dict
        The audit's ``frontier``; a run without accuracy is left out.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axis = _axis(7.2, 4.2)
        floors = [100 * f for p in points if (f := value(p.get("floor"))) is not None]
        if floors:
            # one line, or a band where the runs' floors differ
            axis.axvspan(min(floors) - 0.15, max(floors) + 0.15, color=_MUTED, alpha=0.55, lw=0)
            axis.annotate(
                "floor: nothing released",
                (max(floors), 0.02), (4, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=9.5, color=_MUTED,
            )  # fmt: skip
        tags = [t for n, p in enumerate(points, 1) if (t := _frontier_run(axis, n, p)) is not None]
        axis.set_xlim(-2, 112)
        axis.set_xlabel("tokens recovered, %  (further left is more private)")
        axis.set_ylabel("accuracy of the task, %")
        axis.margins(y=0.14)
        _number_runs(axis, tags)
        if tags:
            handles = axis.get_legend_handles_labels()
            axis.legend(*handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        said = "Accuracy of each run against the share of tokens recovered; figures in the table."
        return _svg(figure, "frontier", said)


def _frontier_run(axis: Axes, number: int, point: Mapping[str, Any]) -> _Tag | None:
    accuracy = value(point.get("accuracy"))
    if accuracy is None:
        return None
    unaware, adaptive = value(point.get("unaware")), value(point.get("adaptive"))
    known = [100 * x for x in (unaware, adaptive) if x is not None]
    if not known:
        return None
    y = 100 * accuracy
    axis.plot(known, [y] * len(known), color=_MUTED, linewidth=1, linestyle=":", zorder=2)
    for share, marker, face, edge, label in (
        (unaware, "D", _SURFACE, _CALM, "attacker does not know the perturbation"),
        (adaptive, "o", _LEAK, _LEAK, "attacker knows the perturbation"),
    ):
        if share is not None:
            seen = label in axis.get_legend_handles_labels()[1]
            axis.plot(
                [100 * share], [y], marker, markersize=8, markerfacecolor=face, zorder=3,
                markeredgecolor=edge, markeredgewidth=1.8, label="_" if seen else label,
                linestyle="none",
            )  # fmt: skip
    return number, max(known), y


def _number_runs(axis: Axes, tags: Sequence[_Tag]) -> None:
    """Write the number right of each run's marks; runs on one spot share a label."""
    low, high = axis.get_ylim()
    gap = (high - low) * 0.05
    spots: list[list[_Tag]] = []
    for tag in sorted(tags, key=lambda tag: (tag[2], tag[0])):
        near = (s for s in spots if abs(s[-1][1] - tag[1]) < 4 and tag[2] - s[-1][2] < gap)
        spot = next(near, None)
        if spot is None:
            spots.append([tag])
        else:
            spot.append(tag)
    for spot in spots:
        numbers, shares, accuracies = zip(*spot, strict=True)
        axis.text(
            max(shares) + 2.5, sum(accuracies) / len(spot), ", ".join(map(str, sorted(numbers))),
            color=_INK, va="center", fontweight="bold",
        )  # fmt: skip


def averaging_figure(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw recovery over the number of releases averaged.

    Parameters
    ----------
    rows : sequence of dict
        The audit's ``repeats.averaging``.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axis = _axis(6.2, 3.0)
        releases = [row["releases"] for row in rows]
        for name, label, look, colour in (
            ("top1", "all tokens", "o-", _LEAK),
            ("content_top1", "content words", "s--", _CALM),
        ):
            shares = _percents(row.get(name) for row in rows)
            axis.plot(releases, shares, look, color=colour, label=label)
        axis.set_xscale("log")
        axis.set_xticks(releases, [str(r) for r in releases])
        axis.minorticks_off()
        axis.set_ylim(0, 104)  # from zero: a small gain shall look small
        axis.set_xlabel("releases of a sentence that are averaged")
        axis.set_ylabel("tokens recovered, %")
        axis.legend(loc="lower right")
        return _svg(figure, "averaging", "Tokens recovered over releases; figures in the table.")


def curve_figure(name: str, curve: Mapping[str, Any]) -> Markup:
    """Draw what an attack watched while it was fitted.

    Parameters
    ----------
    name : str
        Unique on the page.
    curve : dict
        ``x``, ``y``, ``xlabel``, ``ylabel``.
    """
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    with mpl.rc_context(_STYLE):
        figure, axis = _axis(3.7, 2.5)
        x, heights = curve["x"], [float("nan") if y is None else y for y in curve["y"]]
        axis.plot(x, heights, color=_LEAK, marker="o" if len(x) <= 12 else None)
        xlabel, ylabel = str(curve.get("xlabel") or "step"), str(curve.get("ylabel") or "")
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=all(float(v).is_integer() for v in x)))
        return _svg(figure, f"curve-{name}", f"{ylabel} over {xlabel}")


def _percents(shares: Iterable[Any]) -> list[float]:
    numbers = (value(share) for share in shares)
    return [float("nan") if number is None else 100 * number for number in numbers]


def _axis(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure directly, not pyplot: no window system, and nothing kept between two pages
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axis: Axes = figure.subplots()
    return figure, axis


def _svg(figure: Figure, name: str, said: str) -> Markup:
    """Render; the name salts the ids, so that two figures of a page share none."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", text)
    text = re.sub("|".join(_COLOURS), lambda found: _COLOURS[found[0]], text)
    # the same size of type in all figures, where the window is wide enough
    width, height = (72 * inches for inches in figure.get_size_inches())
    opening = (
        f'<svg role="img" aria-label="{escape(said)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{1.3 * width:.0f}px"'
    )
    # drawn above from numbers and escaped labels, hence safe
    return Markup(re.sub(r"<svg[^>]*", lambda _: opening, text, count=1).strip())
