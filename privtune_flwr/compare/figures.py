"""A comparison as pictures: accuracy against what it costs, and learning curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
_MARKERS = "oshvD^P*X<>pdH8"
Draw = Callable[[Any, Sequence[tuple[int, Row]]], None]


def draw_figures(folder: Path, stem: str, content: Row) -> list[Path]:
    """Draw what there is something to draw for.

    Parameters
    ----------
    folder : Path
        Where ``<stem>-bytes.svg``, ``-seconds.svg``, ``-attack.svg``, ``-curves.svg`` and
        ``-curves-bytes.svg`` go; the same comparison gives the same bytes.
    stem : str
    content : dict
        As in ``comparison.json``.

    Returns
    -------
    list of Path
        The pictures that were drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(n, r) for n, r in enumerate(content["methods"]) if r["accuracy"] is not None]
    title = content["scenario"]["name"]
    drawn = []
    figures: tuple[tuple[str, Callable[[Row], bool], Draw], ...] = (
        ("bytes", lambda r: _bound(r) or r["bytes_up"] + r["bytes_down"] > 0, _bytes),
        ("seconds", lambda r: _bound(r) or r["device_seconds"] > 0, _seconds),
        ("attack", lambda r: not _bound(r) and r["attack"] is not None, _attack),
        ("curves", lambda r: any(c["points"] for c in r["curves"]), _curves("epoch")),
        (
            "curves-bytes",
            lambda r: (
                not _bound(r)
                and any(p.get("bytes", 0) > 0 for c in r["curves"] for p in c["points"])
            ),
            _curves("bytes"),
        ),
    )
    for name, shown, draw in figures:
        chosen = [(number, row) for number, row in rows if shown(row)]
        if not all(_bound(row) for _, row in chosen):
            path = folder / f"{stem}-{name}.svg"
            _save(path, title, lambda axis, draw=draw, chosen=chosen: draw(axis, chosen))  # type: ignore[misc]
            drawn.append(path)
    return drawn


def _save(path: Path, title: str, draw: Callable[[Any], None]) -> None:
    # Figure directly, not pyplot: no window system is needed
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "comparison", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        draw(axis)
        axis.set_ylabel("accuracy on the public test set, %")
        axis.set_title(title)
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        temporary = path.with_suffix(".tmp.svg")
        figure.savefig(temporary, metadata={"Date": None})
    temporary.replace(path)


def _bound(row: Row) -> bool:
    """Say whether a row is a line to hold the others against: it has no place on a cost axis."""
    return bool(row["family"] == "bound")


def _style(number: int) -> dict[str, Any]:
    """Give a method its colour and marker, the same in every picture."""
    return {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _scatter(
    axis: Any, rows: Sequence[tuple[int, Row]], place: Callable[[Row], float | None]
) -> None:
    for number, row in rows:
        if _bound(row):
            line = {**_style(number), "marker": ""}
            axis.axhline(
                100 * row["accuracy"], linestyle=":", linewidth=1, label=row["method"], **line
            )
            continue
        x = place(row)
        if x is None:
            continue
        axis.errorbar(
            [x],
            [100 * row["accuracy"]],
            yerr=None if row["sd"] is None else [100 * row["sd"]],
            linestyle="none",
            capsize=3,
            label=row["method"],
            **_style(number),
        )


def _bytes(axis: Any, rows: Sequence[tuple[int, Row]]) -> None:
    _scatter(axis, rows, lambda r: (r["bytes_up"] + r["bytes_down"]) / 1e6)
    _logarithmic(axis)
    axis.set_xlabel("MB a device, up and down, of training")


def _seconds(axis: Any, rows: Sequence[tuple[int, Row]]) -> None:
    _scatter(axis, rows, lambda r: r["device_seconds"])
    _logarithmic(axis)
    axis.set_xlabel("compute seconds of a device")


def _attack(axis: Any, rows: Sequence[tuple[int, Row]]) -> None:
    # one measure for all: content words only if every attack knows them
    content = all(row["attack"]["content"] is not None for _, row in rows)
    key = "content" if content else "tokens"
    _scatter(
        axis,
        rows,
        lambda r: None if r["attack"][key] is None else 100 * float(r["attack"][key]),
    )
    axis.set_xlim(-3, 103)
    word = "content words" if content else "tokens"
    axis.set_xlabel(f"{word} read by an attacker who knows all but the secrets, %")


def _curves(key: str) -> Draw:
    def draw(axis: Any, rows: Sequence[tuple[int, Row]]) -> None:
        scale = 1e-6 if key == "bytes" else 1.0
        for number, row in rows:
            label: str | None = row["method"]
            # every seed is a thin line of its own
            for curve in row["curves"]:
                points = [p for p in curve["points"] if p.get(key, 0) > 0]
                if not points:
                    continue
                axis.plot(
                    [scale * p[key] for p in points],
                    [100 * p["accuracy"] for p in points],
                    linewidth=1,
                    markersize=4,
                    alpha=0.8,
                    label=label,
                    **_style(number),
                )
                label = None
        if key == "bytes":
            _logarithmic(axis)
        axis.set_xlabel("MB a device so far" if key == "bytes" else "epoch")

    return draw
