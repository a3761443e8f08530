"""SplitFed: what the cloud prepares before it asks anyone; devices are given the bottom model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from privtune_flwr.cloud import cloud_cache
from privtune_flwr.config import RunConfig
from privtune_flwr.federated.cloud import FederatedCloud
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.splitfed import SplitFedModel, adapt_bottom
from privtune_flwr.models import ModelError, cut_model, resolve_model
from privtune_flwr.training.trainer import pick_device


class SplitFedCloud(FederatedCloud):
    """What the cloud prepared for SplitFed: devices are given the bottom model only."""

    def build(self, labels: Sequence[str]) -> SplitFedModel:
        """Cut the model, with a head for these classes, and make both halves trainable."""
        model = self.config.model
        parts = cut_model(
            resolve_model(model.name),
            cut=model.cut,
            num_labels=len(labels),
            head=model.head,
            seed=self.config.run.seed,
            labels=labels,
        )
        whole = SplitFedModel(parts, self.settings)
        whole.to(pick_device(self.config.train.device))
        return whole


def prepare_splitfed(config: RunConfig) -> SplitFedCloud:
    """Cut the model and bundle the bottom part, the only one that devices are given.

    Raises
    ------
    ModelError
        Before any device is asked, naming the key and what is allowed.
    """
    start = time.perf_counter()
    settings = FitSettings.of(config)
    cache = cloud_cache()
    cut = cut_model(
        resolve_model(config.model.name),
        cut=config.model.cut,
        num_labels=2,
        head=config.model.head,
        seed=config.run.seed,
    )
    limit = cut.bottom.max_positions
    if limit is not None and config.model.max_length > limit:
        raise ModelError(
            f"model.max-length = {config.model.max_length}: this model has {limit} positions"
        )
    with tempfile.TemporaryDirectory(dir=cache.root) as folder:
        cut.bottom.save(folder)
        manifest = cache.add_folder(Path(folder))
    adapt_bottom(cut.bottom, settings)  # what cannot be adapted is refused before devices are asked
    cloud = SplitFedCloud(config, settings, (manifest, cache.path(manifest.id)))
    cloud.seconds["prepare"] = time.perf_counter() - start
    return cloud
