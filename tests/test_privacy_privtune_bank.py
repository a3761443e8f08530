"""``privtune bank``: built once, from public text alone, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import HIDDEN, VOCAB, save_tiny
from typer.testing import CliRunner

from privtune_flwr import data
from privtune_flwr.cli import main
from privtune_flwr.config import RunConfig, load_run_config
from privtune_flwr.privacy.privtune import command
from privtune_flwr.privacy.privtune.command import describe_bank

PUBLIC = [" ".join(f"w{i}" for i in np.random.default_rng(n).integers(0, 45, 9)) for n in range(80)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A tiny model, public text of its own words, and private text that must not be touched."""
    monkeypatch.setattr(command, "load_public_text", lambda names: PUBLIC)
    save_tiny("bert", tmp_path / "model", content="classifier")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("private text was loaded")

    monkeypatch.setattr(data, "load_source", refuse)
    monkeypatch.setattr("privtune_flwr.data.sources.load_source", refuse)
    return load_run_config(
        {
            "model.name": str(tmp_path / "model"),
            "model.cut": 1,
            "model.max-length": 32,
            "privacy.neighbours": 4,
        }
    )


def test_the_bank_is_built_once_and_memory_mapped(config: RunConfig, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    cache = tmp_path / "cache"
    first = describe_bank(config, cache, lambda name, share: told.append((name, share)))
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")}
    second = describe_bank(config, cache)
    assert [first[part]["built"] for part in ("bank", "graph")] == [True, True]
    assert [second[part]["built"] for part in ("bank", "graph")] == [False, False]
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.npy")} == files
    same = ("id", "unit", "mean_norm", "hops", "unseen", "vocabulary")
    assert all(first[key] == second[key] for key in same)
    (bank,) = (p for p in files if p.stem == "bank")
    rows = np.load(bank, mmap_mode="r")
    assert rows.shape == (VOCAB, HIDDEN) == (first["vocabulary"], first["hidden_size"])
    assert first["bank"]["bytes"] == rows.nbytes
    assert first["mean_norm"] == pytest.approx(np.linalg.norm(rows, axis=1).mean())
    assert max(share for name, share in told if name == "bank") == pytest.approx(1)
    # another model or text is another bank
    other = config.model_copy(update={"model": config.model.model_copy(update={"cut": 2})})
    changed = describe_bank(other, cache)
    assert changed["bank"]["built"]
    assert changed["id"] != first["id"]


def test_private_settings_do_not_matter_to_the_bank(config: RunConfig, tmp_path: Path) -> None:
    private = config.data.model_copy(update={"source": "bbc-news", "train_examples": 7})
    here = describe_bank(config, tmp_path / "cache")
    there = describe_bank(config.model_copy(update={"data": private}), tmp_path / "cache")
    assert here["id"] == there["id"]
    assert not there["bank"]["built"]


def test_the_command_shows_and_writes_its_figures(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "cache_root", lambda: tmp_path / "cache")
    settings = ["model.cut=1", "model.max-length=32", "privacy.neighbours=4"]
    words = [f"--set={s}" for s in (*settings, f"model.name={config.model.name}")]
    result = CliRunner().invoke(main, ["bank", *words, "--json", str(tmp_path / "bank.json")])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "bank.json").read_text(encoding="utf-8"))
    assert [hop["n"] for hop in found["hops"]] == [1, 2, 3, 4]
    assert found["hops"][0]["median"] >= 4
    # ten of the words, and the tokenizer's own but two, never occur
    assert 0 < found["unseen"] < 0.5
    for word in ("vocabulary", "unit", "hops away", f"{found['unseen']:.1%}", "built"):
        assert word in result.output
    wrong = CliRunner().invoke(main, ["bank", "--set=model.cut=-1"])
    assert wrong.exit_code == 1
    assert "model.cut" in wrong.output
