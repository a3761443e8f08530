"""Results as a table, one column a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Cell = Callable[[dict[str, Any]], str]


def _get(results: dict[str, Any], *path: str) -> Any:
    value: Any = results
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _number(pattern: str, *path: str, factor: float = 1.0) -> Cell:
    def cell(results: dict[str, Any]) -> str:
        value = _get(results, *path)
        return "-" if value is None else pattern.format(value * factor)

    return cell


def _text(*path: str) -> Cell:
    return lambda results: str(_get(results, *path))


_ROWS: tuple[tuple[str, Cell], ...] = (
    ("model, cut", lambda r: f"{r['config']['model.name']}, {r['config']['model.cut']}"),
    ("mechanism", _text("privacy", "mechanism")),
    ("decoder", lambda r: "on" if r["privacy"]["decoder"] else "off"),
    ("noise, units (mean norm)", _number("{:.3f}", "privacy", "mean_noise_norm_units")),
    ("largest eta", _number("{:.4g}", "privacy", "eta_max")),
    ("largest epsilon", _number("{:.4g}", "privacy", "epsilon_max")),
    ("bits a token at most", _number("{:.4g}", "privacy", "bits_max")),
    ("learning rounds", _number("{:.0f}", "learning_rounds")),
    ("epsilon of the learning", _number("{:.4g}", "privacy", "learning", "epsilon")),
    ("releases per example", _number("{:.0f}", "privacy", "releases_per_example")),
    ("accuracy, public test", _number("{:.4f}", "final", "test_accuracy")),
    ("accuracy, on devices", _number("{:.4f}", "final", "eval_accuracy")),
    ("training loss, last round", _number("{:.4f}", "final", "loss")),
    ("training examples", _number("{:.0f}", "examples", "train_received")),
    ("devices used", _number("{:.0f}", "devices", "used")),
    (
        "devices left out",
        lambda r: str(len({**r["devices"]["quarantined"], **r["devices"]["refused"]})),
    ),
    ("messages", _number("{:.0f}", "traffic", "messages")),
    ("MB up", _number("{:.2f}", "traffic", "bytes_up", factor=1e-6)),
    ("MB down", _number("{:.2f}", "traffic", "bytes_down", factor=1e-6)),
    ("kB up per example", _number("{:.2f}", "traffic", "bytes_up_per_train_example", factor=1e-3)),
    ("seconds: bottom (devices)", _number("{:.1f}", "seconds", "bottom")),
    ("seconds: mechanism (devices)", _number("{:.1f}", "seconds", "mechanism")),
    ("seconds: codec (devices)", _number("{:.1f}", "seconds", "codec")),
    ("seconds: wire, waiting", _number("{:.1f}", "seconds", "wire")),
    ("seconds: decoder", _number("{:.1f}", "seconds", "decode")),
    ("seconds: top model", _number("{:.1f}", "seconds", "top")),
    ("seconds: preparation", _number("{:.1f}", "seconds", "prepare")),
    ("seconds: federation", _number("{:.1f}", "seconds", "total")),
    ("driver peak MB", _number("{:.0f}", "memory", "driver_peak_bytes", factor=1e-6)),
)


def results_table(runs: Sequence[dict[str, Any]]) -> Table:
    """Lay runs side by side."""
    table = Table(title="PrivTune federation" if len(runs) == 1 else None)
    table.add_column("")
    for results in runs:
        table.add_column(str(results["name"]), justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(results) for results in runs))
    return table


def print_results(runs: Sequence[dict[str, Any]]) -> None:
    """Print the table to the console; where there is no terminal, wide enough for all columns."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=40 + 24 * len(runs))
    console.print(results_table(runs))
