"""Many devices, few a round: whether the driver's memory grows with their number.

``python -m simulations.scale``: the same 3,200 sentences on 20 and on 200 virtual devices, 20 a
round in both. Writes ``simulations/results/scale.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from privtune_flwr.config import Scalar
from privtune_flwr.results.run_folder import write_text
from simulations.study import RESULTS, Case, run_study

SETTINGS: dict[str, Scalar] = {
    "privacy.mechanism": "privtune",
    "privacy.decoder": False,
    "privacy.chunk-size": 16,
    "train.epochs": 1,
}
CASES = [
    Case("20-devices", {**SETTINGS, "train.fraction": 1.0}, devices=20),
    Case("200-devices", {**SETTINGS, "train.fraction": 0.1}, devices=200),
]


def _measure(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return {
        "devices_used": results["devices"]["used"],
        "devices_a_round": max(int(r.get("devices", 0)) for r in rounds),
        "store_bytes": results["traffic"]["store_bytes"],
    }


def main(
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs/scale"),
) -> None:
    """Run both sizes and store the driver's peak memory beside the store's size."""
    rows = run_study("scale", CASES, runs=runs, measure=_measure)
    few, many = (next(r for r in rows if r["name"] == case.name) for case in CASES)
    peak = [row["memory"]["driver_peak_bytes"] for row in (few, many)]
    content = json.loads((RESULTS / "scale.json").read_text(encoding="utf-8"))
    content["driver_peak_ratio"] = peak[1] / peak[0]
    write_text(RESULTS / "scale.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    for row in (few, many):
        print(
            f"{row['name']}: {row['devices_used']} used, {row['devices_a_round']} a round, driver "
            f"peak {row['memory']['driver_peak_bytes'] / 1e6:.0f} MB, store "
            f"{row['store_bytes'] / 1e6:.0f} MB, {row['seconds']['total']:.0f} s"
        )


if __name__ == "__main__":
    typer.run(main)
