"""Shared by the tests of the core: a real bottom model, and devices that hold it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from device_kit import Device, clean_rows
from learned_kit import ToyLearned, ToyLearner
from tiny_models import one_thread, save_tiny

from privtune_flwr.assets import model_folder
from privtune_flwr.bundle import BundleCache, Manifest
from privtune_flwr.data import load_source
from privtune_flwr.models import BottomModel, CutModel, cut_model
from privtune_flwr.privacy import registry
from privtune_flwr.privacy.learning import State


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Short computations on a busy machine: waiting for other threads would be all the cost."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def movies() -> datasets.Dataset:
    """All of movie-snippets."""
    return load_source("movie-snippets")


@pytest.fixture(scope="module")
def newsgroups() -> datasets.Dataset:
    """All of 20newsgroups."""
    return load_source("20newsgroups")


@pytest.fixture(scope="session")
def minilm() -> CutModel:
    """MiniLM cut at 1, with two classes. Copy its top model before training it."""
    return cut_model(model_folder("minilm"), cut=1, num_labels=2, head="native", seed=0)


@pytest.fixture(scope="session")
def bottom_bundle(
    minilm: CutModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """A cache that holds the bottom model's bundle, and its manifest."""
    root = tmp_path_factory.mktemp("bottom")
    minilm.bottom.save(root / "files")
    manifest = BundleCache(root / "bundles").add_folder(root / "files")
    shutil.rmtree(root / "files")
    return root / "bundles", manifest


@pytest.fixture(scope="session")
def make_device(
    bottom_bundle: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Device]:
    """Make a provisioned device; ``run`` is the run config, other keywords the node config."""
    bundles, manifest = bottom_bundle

    def make(run: dict[str, Any] | None = None, **node_config: Any) -> Device:
        dashed = {key.replace("_", "-"): value for key, value in node_config.items()}
        return Device(tmp_path_factory.mktemp("home"), bundles, manifest.id, dashed, run or {})

    return make


@pytest.fixture(scope="module")
def device(make_device: Callable[..., Device]) -> Device:
    """A device with a generous policy, for tests that do not change it."""
    return make_device(policy_mechanisms="*", policy_releases_per_example=0)


@pytest.fixture(scope="module")
def clean(device: Device) -> np.ndarray:
    """Clean rows of the device's first chunk."""
    return clean_rows(device)


@pytest.fixture(scope="module")
def tiny_bottom(tmp_path_factory: pytest.TempPathFactory) -> BottomModel:
    """A tiny BERT's two lowest blocks."""
    folder = save_tiny("bert", tmp_path_factory.mktemp("bert"))
    return cut_model(folder, cut=2, num_labels=3, seed=0).bottom


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """Have the toy of a learned mechanism in the registry."""
    registry.register_mechanism(ToyLearned)
    yield
    del registry._MECHANISMS[ToyLearned.name]


@pytest.fixture(scope="module")
def state(minilm: CutModel) -> State:
    """What the toy's learning starts from."""
    return ToyLearner(minilm.bottom, 2).start()
