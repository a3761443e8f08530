"""The learning curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_learning_curve(
    path: Path, title: str, rounds: Sequence[dict[str, Any]], steps: Sequence[Sequence[float]]
) -> None:
    """Draw loss by step, and accuracy by round where it was measured.

    Parameters
    ----------
    path : Path
        A PNG file.
    title : str
        The run's name.
    rounds : sequence of dict
        As in ``rounds.jsonl``.
    steps : sequence of [step, loss, learning rate]
        As in ``steps.jsonl``.
    """
    # Figure directly, not pyplot: the server app runs in a thread and needs no window system
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    numbers, losses = [s[0] for s in steps], [s[1] for s in steps]
    axis.plot(numbers, losses, color="0.8", linewidth=0.8, label="loss of a batch")
    axis.plot(numbers, _smooth(losses), color="tab:blue", label="loss, smoothed")
    axis.set_xlabel("optimiser step")
    axis.set_ylabel("training loss")
    axis.set_ylim(bottom=0)
    ends = _round_ends(rounds)
    for record, end in zip(rounds, ends, strict=True):
        if record.get("kind") == "release":
            axis.axvline(end, color="0.9", linewidth=0.8, zorder=0)
    right = axis.twinx()
    for key, colour, name in (
        ("test_accuracy", "tab:red", "accuracy, public test set"),
        ("eval_accuracy", "tab:green", "accuracy, on the devices"),
    ):
        points = [(e, r[key]) for r, e in zip(rounds, ends, strict=True) if key in r]
        if points:
            right.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    right.set_ylabel("accuracy")
    right.set_ylim(0, 1)
    handles = axis.get_legend_handles_labels()[0] + right.get_legend_handles_labels()[0]
    axis.legend(handles=handles, loc="lower left", frameon=False)
    axis.set_title(f"{title} (light lines: a release round ends)")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def _round_ends(rounds: Sequence[dict[str, Any]]) -> list[int]:
    ends: list[int] = []
    for record in rounds:
        ends.append((ends[-1] if ends else 0) + int(record.get("steps", 0)))
    return ends


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    smooth: list[float] = []
    mean, norm = 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smooth.append(mean / norm)
    return smooth
