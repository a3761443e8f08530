"""The text a device holds, in the order in which it releases it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from privtune_flwr.config import DataConfig, RunConfig
from privtune_flwr.data import DeviceData, device_part, load_source, split_source
from privtune_flwr.device.home import DeviceHome
from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.keyed import keyed_generator


@dataclass(frozen=True)
class Chunk:
    """Consecutive examples of one split."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Holdings:
    """A device's private examples.

    Attributes
    ----------
    train, evaluation : Chunk
        All examples of each split, in the device's own secret order: the order in a file (by date,
        by author, by class) must not leave with them.
    label_names : tuple of str
        Class names in order of their ids.
    """

    train: Chunk
    evaluation: Chunk
    label_names: tuple[str, ...]

    def split(self, name: str) -> Chunk:
        """Return ``train`` or ``eval``."""
        return self.train if name == "train" else self.evaluation

    def chunk(self, split: str, number: int, size: int) -> Chunk:
        """Give chunk ``number`` of ``size`` examples.

        Raises
        ------
        Refusal
            If the split has no such chunk.
        """
        whole = self.split(split)
        start = number * size
        if number < 0 or start >= len(whole.texts):
            raise Refusal(f"request.chunk = {number}: {split} has none of that number")
        return Chunk(whole.texts[start : start + size], whole.labels[start : start + size])


def open_holdings(config: RunConfig, node_config: Mapping[str, Any], home: DeviceHome) -> Holdings:
    """Load what this device holds.

    Parameters
    ----------
    config : RunConfig
        Source, split and partitioner, for devices that hold a part of a shared source.
    node_config : Mapping
        ``data`` names the device's own file (csv, jsonl or parquet); ``text-column`` and
        ``label-column`` (never the run's: class names leave with the description) and ``labels``
        say how to read it. Else ``partition-id`` and
        ``num-partitions``.
    home : DeviceHome
        Its secret keys the order of the examples.
    """
    own_file = str(node_config.get("data", ""))
    if own_file:
        data = config.data.model_copy(
            update={
                "source": f"file:{Path(own_file).expanduser()}",
                "text_column": str(node_config.get("text-column", "text")),
                "label_column": str(node_config.get("label-column", "label")),
                "labels": str(node_config.get("labels", config.data.labels)),
            }
        )
        part = _own_part(data, home)
    else:
        if config.data.source.startswith("file:") and not home.simulated:
            # the run configuration is the cloud's word: it must not choose a file on this disk
            raise Refusal("data.source: a file on a device is named by its node-config data alone")
        if "partition-id" not in node_config or "num-partitions" not in node_config:
            raise Refusal("node-config: needs data, or partition-id and num-partitions")
        part = shared_part(
            config.data,
            config.run.seed,
            int(node_config["partition-id"]),
            int(node_config["num-partitions"]),
        )
    return Holdings(
        train=_ordered(part.train, home, "train"),
        evaluation=_ordered(part.evaluation, home, "eval"),
        label_names=_label_names(part.train),
    )


def _source(data: DataConfig) -> Dataset:
    return load_source(
        data.source,
        text_column=data.text_column,
        label_column=data.label_column,
        labels=_names(data.labels),
    )


# Caches only: a process that lacks them computes the same values.
@lru_cache(maxsize=4)
def _pool(data: DataConfig, seed: int) -> Dataset:
    return split_source(_source(data), data, seed=seed).pool


@lru_cache(maxsize=256)
def shared_part(data: DataConfig, seed: int, partition: int, partitions: int) -> DeviceData:
    """Give one partition of a source that a simulation's devices share."""
    return device_part(
        _pool(data, seed), data, partition_id=partition, num_partitions=partitions, seed=seed
    )


def _own_part(data: DataConfig, home: DeviceHome) -> DeviceData:
    """Split a device's own file; which rows evaluate is keyed by its secret."""
    whole = _source(data)
    order = keyed_generator(home.derive("split"), "own file").permutation(len(whole))
    share = data.eval_examples / max(1, data.train_examples + data.eval_examples)
    evaluation = round(len(whole) * share)
    return DeviceData(whole.select(order[evaluation:]), whole.select(order[:evaluation]))


def _ordered(part: Dataset, home: DeviceHome, split: str) -> Chunk:
    order = keyed_generator(home.derive("order"), split).permutation(len(part))
    texts, labels = part["text"], part["label"]
    return Chunk([str(texts[int(i)]) for i in order], [int(labels[int(i)]) for i in order])


def _label_names(part: Dataset) -> tuple[str, ...]:
    feature = part.features["label"]
    assert isinstance(feature, ClassLabel)
    return tuple(feature.names)


def _names(joined: str) -> Sequence[str]:
    return tuple(name.strip() for name in joined.split(",") if name.strip())


def chunk_count(examples: int, size: int) -> int:
    """Chunks that ``examples`` fill."""
    return int(np.ceil(examples / size))
