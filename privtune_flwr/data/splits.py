"""What the devices hold and what the cloud tests on, disjoint by row and by text."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray

from privtune_flwr.config import DataConfig
from privtune_flwr.data.columns import DataError
from privtune_flwr.data.packaged import PACKAGED
from privtune_flwr.data.sources import load_source

_OFFICIAL_SPLIT = ("20newsgroups",)


@dataclass(frozen=True)
class Split:
    """The devices' pool, in a seeded order, and the cloud's test set (``None``: there is none)."""

    pool: datasets.Dataset
    test: datasets.Dataset | None


def split_source(dataset: datasets.Dataset, config: DataConfig, *, seed: int) -> Split:
    """Divide a source into the devices' pool and the cloud's public test set.

    The same arguments give the same split in every process: each simulated device recomputes it.

    Parameters
    ----------
    dataset : datasets.Dataset
        What ``load_source(config.source, ...)`` gave.
    config : DataConfig
        ``test-source``: ``held-out`` takes ``test-examples`` rows of this dataset
        (20newsgroups: of its official test split, at most as many as that has); ``none`` takes
        no test, which is what a device with its own file wants; another source gives at most
        ``test-examples`` of its rows. The pool then is ``train-examples + eval-examples`` rows
        of what is left, or all of it when ``train-examples`` is 0.
    seed : int
        Of the shuffle.

    Returns
    -------
    Split
        No text of ``test`` is in ``pool``, however it is cased or spaced.

    Raises
    ------
    DataError
        If there are too few rows, or as :func:`load_source` for another test source.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    rest, test = _take_test(dataset, config, order, seed)
    if test is not None:
        held = {_normal(text) for text in test["text"]}
        texts = dataset["text"][:]
        rest = np.array([row for row in rest if _normal(texts[row]) not in held], dtype=np.int64)
    wanted = config.train_examples + config.eval_examples
    if config.train_examples == 0:
        wanted = max(len(rest), config.eval_examples + 1)
    if len(rest) < wanted:
        raise DataError(
            f"{config.source}: data.train-examples = {config.train_examples} and "
            f"data.eval-examples = {config.eval_examples} need {wanted} rows; {len(rest)} of "
            f"{len(dataset)} are left{_beside(config, test)}"
        )
    return Split(pool=dataset.select(rest[:wanted]), test=test)


def _take_test(
    dataset: datasets.Dataset, config: DataConfig, order: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], datasets.Dataset | None]:
    """Give the rows that are left, in order, and the test set."""
    official = config.source in _OFFICIAL_SPLIT and "split" in dataset.column_names
    size = config.test_examples
    if official and config.test_source == "held-out":
        is_test = np.array(dataset["split"][:])[order] == "test"
        return order[~is_test], dataset.select(order[is_test][:size]) if size else None
    if config.test_source == "none" or size == 0:
        return order, None
    if config.test_source != "held-out":
        return order, _other_source(dataset, config, seed)
    if size >= len(dataset):
        raise DataError(
            f"{config.source}: data.test-examples = {size} leaves nothing to train on; "
            f"the source has {len(dataset)} rows"
        )
    return order[size:], dataset.select(order[:size])


def _other_source(dataset: datasets.Dataset, config: DataConfig, seed: int) -> datasets.Dataset:
    packaged = config.test_source in PACKAGED
    test = load_source(
        config.test_source,
        text_column="text" if packaged else config.text_column,
        label_column="label" if packaged else config.label_column,
        labels=dataset.features["label"].names,
    )
    order = np.random.default_rng(seed).permutation(len(test))
    return test.select(order[: config.test_examples])


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _beside(config: DataConfig, test: datasets.Dataset | None) -> str:
    if test is None:
        return ""
    return f" beside the test set (data.test-source = {config.test_source}, {len(test)} rows)"
