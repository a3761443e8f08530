"""The cloud's side of a federated baseline: the whole model, its bundle, its test."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.cloud import cloud_cache
from privtune_flwr.config import RunConfig
from privtune_flwr.data import tokenise
from privtune_flwr.data.held_out import class_positions, load_test_set
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, load_whole
from privtune_flwr.models import ModelError, resolve_model
from privtune_flwr.training.trainer import accuracy_and_loss, pick_device

logger = logging.getLogger("privtune.cloud")

_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")


@dataclass
class FederatedCloud:
    """What the cloud prepared for a baseline.

    Attributes
    ----------
    config : RunConfig
    settings : FitSettings
        What devices are told of it.
    model_bundle : (Manifest, Path)
        The whole pretrained model, which every device holds.
    public_bundle : (Manifest, Path) or None
        What else a method needs on devices; public.
    seconds : dict
        Time spent on preparation and tests.
    """

    config: RunConfig
    settings: FitSettings
    model_bundle: tuple[Manifest, Path]
    public_bundle: tuple[Manifest, Path] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"prepare": 0.0, "test": 0.0})
    _test: tuple[list[NDArray[np.int32]], list[int]] | None = None

    @property
    def bundles(self) -> list[tuple[Manifest, Path]]:
        """All bundles that devices must hold."""
        return [self.model_bundle, *([self.public_bundle] if self.public_bundle else [])]

    @property
    def model_id(self) -> str:
        """Hash of the whole model's bundle."""
        return self.model_bundle[0].id

    @property
    def public_id(self) -> str:
        """Hash of the public bundle; empty where there is none."""
        return self.public_bundle[0].id if self.public_bundle else ""

    def build(self, labels: Sequence[str]) -> WholeModel:
        """Load the model with a head for these classes, as devices do."""
        model = load_whole(self.model_bundle[1], self.settings, labels)
        model.to(pick_device(self.config.train.device))
        return model

    def test(self, model: WholeModel) -> tuple[float, float] | None:
        """Give accuracy and mean loss on the public test set; None where there is none."""
        data = self.config.data
        if data.test_source == "none" or data.test_examples == 0:
            return None
        start = time.perf_counter()
        if self._test is None:
            labels = model.parts.spec.labels
            test = load_test_set(self.config, labels)
            position = class_positions(test, labels, data)
            ids = tokenise(model.parts.tokenizer, list(test["text"]), self.config.model.max_length)
            self._test = ids, [position[int(v)] for v in test["label"]]
        sequences, wanted = self._test
        found = accuracy_and_loss(model.logits(sequences), wanted)
        self.seconds["test"] += time.perf_counter() - start
        return found


def prepare_federated(config: RunConfig) -> FederatedCloud:
    """Bundle the whole model that devices of a baseline hold.

    Raises
    ------
    ModelError, AssetError
        Before any device is asked, naming the key and what is allowed.
    """
    if config.train.strategy == "splitfed":
        from privtune_flwr.federated.splitfed_cloud import prepare_splitfed

        return prepare_splitfed(config)
    start = time.perf_counter()
    source = resolve_model(config.model.name)
    cache = cloud_cache()
    with tempfile.TemporaryDirectory(dir=cache.root) as folder:
        _copy_model(source, Path(folder))
        manifest = cache.add_folder(Path(folder))
    cloud = FederatedCloud(config, FitSettings.of(config), (manifest, cache.path(manifest.id)))
    if config.train.strategy == "distil":
        from privtune_flwr.federated.distil import public_bundle

        cloud.public_bundle = public_bundle(config, cloud.model_bundle[1])
    cloud.seconds["prepare"] = time.perf_counter() - start
    return cloud


def _copy_model(source: Path | str, folder: Path) -> None:
    if isinstance(source, str):
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in _SUFFIXES]
        source = Path(snapshot_download(source, allow_patterns=patterns))
    files = [p for p in source.iterdir() if p.is_file() and p.suffix in _SUFFIXES]
    if not any(p.suffix == ".safetensors" for p in files):
        raise ModelError(f"model.name: {source.name} has no weights as safetensors")
    for path in files:
        shutil.copyfile(path, folder / path.name)
