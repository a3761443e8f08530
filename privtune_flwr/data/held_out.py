"""The public test set: what the cloud may judge a model on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from privtune_flwr.config import ConfigError, DataConfig, RunConfig
from privtune_flwr.data.sources import load_source
from privtune_flwr.data.splits import split_source


def load_test_set(config: RunConfig, labels: Sequence[str]) -> Dataset:
    """Load the public test set in an order that the seed fixes.

    Parameters
    ----------
    config : RunConfig
        ``data.test-source``: ``held-out`` takes a part of the source that no device holds.
    labels : sequence of str
        The devices' classes, for a source of its own.
    """
    data, seed = config.data, config.run.seed
    held_out = data.test_source == "held-out"
    source = load_source(
        data.source if held_out else data.test_source,
        text_column=data.text_column,
        label_column=data.label_column,
        labels=[name for name in data.labels.split(",") if name] if held_out else labels,
    )
    if held_out:
        test = split_source(source, data, seed=seed).test
        assert test is not None
        return test
    order = np.random.default_rng(seed).permutation(len(source))
    return source.select(order[: data.test_examples])


def class_positions(test: Dataset, labels: Sequence[str], data: DataConfig) -> list[int]:
    """Place the test set's classes among the devices'.

    Raises
    ------
    ConfigError
        If the test set has a class that no device has.
    """
    names = test.features["label"].names
    if not set(names) <= set(labels):
        raise ConfigError(
            f"data.test-source = {data.test_source!r}: its classes {', '.join(names)} are not "
            f"the devices' {', '.join(labels)}; allowed: none, or a source with these classes"
        )
    return [list(labels).index(name) for name in names]
