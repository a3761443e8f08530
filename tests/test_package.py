"""The package works outside its checkout, and the README says what the results say."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from simulations.comparison_tables import conditions_table
from simulations.readme import PAGES, ROOT, render


def test_the_installed_package_runs_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), "."],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("privtune_flwr-*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import privtune_flwr, strategies, simulations\n"
        "from pathlib import Path\n"
        "from privtune_flwr.launcher import app_folder\n"
        "from privtune_flwr.scenario import load_scenario, packaged_scenarios\n"
        "from flwr.cli.build import build_fab_from_disk\n"
        "assert Path(privtune_flwr.__file__).is_relative_to(sys.argv[1])\n"
        "assert 'demo' in packaged_scenarios() and load_scenario('demo')\n"
        "with app_folder() as app:\n"
        "    assert 0 < len(build_fab_from_disk(app)) < 10_000_000\n"
        "print('ran')\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", code, str(installed)],
        cwd=elsewhere, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert ran.stdout.strip().endswith("ran"), ran.stderr
    entry_points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "privtune = privtune_flwr.cli:main" in entry_points.read_text()


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_the_stored_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render(text, page) == text


def test_a_page_without_a_tables_place_is_refused() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="headline"):
        render(text.replace("<!-- headline -->", ""), "README.md")


def test_conditions_stand_beside_each_other_with_their_spread() -> None:
    def row(name: str, accuracy: float | None, sd: float | None = None) -> dict[str, object]:
        return {"method": name, "accuracy": accuracy, "sd": sd}

    table = conditions_table(
        {
            "comparison": {
                "methods": [row("ours", 0.8, 0.01), row("fedavg", 0.7), row("bbt", 0.6)]
            },
            "comparison-slow": {"methods": [row("fedavg", 0.65), row("ours", None)]},
            "comparison-oneclass": {"methods": [row("ours", 0.5)]},
        }
    )
    assert table == (
        "| method | devices alike | one class each | slow devices |\n|---|---|---|---|\n"
        # the first one's order, a dash where nothing is known, no row that only the first one has
        "| ours | 80.0 ± 1.0 | 50.0 | - |\n| fedavg | 70.0 | - | 65.0 |\n"
    )
