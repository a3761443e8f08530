"""Which part of the pool a simulated device holds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import datasets
import numpy as np
from numpy.typing import NDArray

from privtune_flwr.config import DataConfig
from privtune_flwr.data.columns import DataError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


@dataclass(frozen=True)
class DeviceData:
    """What one device holds; either part may be empty."""

    train: datasets.Dataset
    evaluation: datasets.Dataset


def device_part(
    pool: datasets.Dataset,
    config: DataConfig,
    *,
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> DeviceData:
    """Give one device's part of the pool, split into training and evaluation.

    The same arguments give the same part in every process. Parts are disjoint and cover the
    pool, and the evaluation parts add up to ``config.eval_examples`` over all devices.

    Parameters
    ----------
    pool : datasets.Dataset
        What :func:`split_source` gave.
    config : DataConfig
        ``partitioner``: ``iid``; ``dirichlet`` (label skew; with many devices some come out
        empty); ``size``; or ``column``, where a device holds all rows of some values of
        ``partition-column``, or, if there are fewer values than devices, some rows of one.
    partition_id, num_partitions : int
        Which device, out of how many.
    seed : int
        Of the shuffle and the partitioner.

    Returns
    -------
    DeviceData
        The device's rows in a seeded order.

    Raises
    ------
    DataError
        If the partition does not exist, the column is missing, or the pool is too small for
        that many devices.
    """
    if not 0 <= partition_id < num_partitions:
        raise DataError(f"partition {partition_id} does not exist: there are {num_partitions}")
    if len(pool) == 0:
        raise DataError("the pool has no rows: there is nothing to partition")
    order = np.random.default_rng(seed).permutation(len(pool))
    # Partitioners see row numbers and codes only: selecting is then quick, and no message of
    # theirs can quote a text, a label or an author.
    keys = _keys(pool, config, num_partitions, seed)
    rows = datasets.Dataset.from_dict({"row": order, "key": keys[order]})
    partitioner = _partitioner(config, num_partitions, seed)
    partitioner.dataset = rows
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # overflow of exp() with very many devices
            before = [len(partitioner.load_partition(i)) for i in range(partition_id)]
            part = np.array(partitioner.load_partition(partition_id)["row"][:], dtype=np.int64)
    except ValueError:
        raise DataError(_too_small(config, len(pool), num_partitions)) from None
    part = np.random.default_rng([seed, partition_id]).permutation(part)
    start = sum(before)
    # Rounded on the running total, not device by device: so the shares add up exactly.
    held = min(config.eval_examples, len(pool))
    evaluation = (start + len(part)) * held // len(pool) - start * held // len(pool)
    cut = len(part) - evaluation
    return DeviceData(train=pool.select(part[:cut]), evaluation=pool.select(part[cut:]))


def _keys(
    pool: datasets.Dataset, config: DataConfig, num_partitions: int, seed: int
) -> NDArray[np.int64]:
    """Give each row's label, or the group its column value is in; zeros where neither is used."""
    if config.partitioner == "dirichlet":
        return np.array(pool["label"][:], dtype=np.int64)
    if config.partitioner != "column":
        return np.zeros(len(pool), dtype=np.int64)
    column = config.partition_column
    if column not in pool.column_names:
        raise DataError(
            f"data.partition-column = {column!r}: no such column; "
            f"there are: {', '.join(pool.column_names)}"
        )
    values = pool[column][:]
    missing = sum(value is None for value in values)
    if missing:
        raise DataError(
            f"data.partition-column = {column!r}: {missing} of {len(values)} rows have no value"
        )
    distinct = sorted({str(value) for value in values})
    # Values are dealt to the devices like cards, in a seeded order. With fewer values than
    # devices each keeps a number of its own, and the partitioner shares its rows out.
    dealt = np.random.default_rng(seed).permutation(len(distinct)) % num_partitions
    group = dict(zip(distinct, dealt.tolist(), strict=True))
    return np.array([group[str(value)] for value in values], dtype=np.int64)


@dataclass
class _Shards:
    """Equal parts: what flwr-datasets' IidPartitioner gives.

    Importing that package brings seaborn and scipy.stats along, a second of computing in every
    process of a device; most runs need none of it.
    """

    num_partitions: int
    dataset: datasets.Dataset | None = None

    def load_partition(self, partition_id: int) -> datasets.Dataset:
        """Give one of the parts."""
        assert self.dataset is not None
        return self.dataset.shard(self.num_partitions, partition_id, contiguous=True)


def _partitioner(config: DataConfig, num_partitions: int, seed: int) -> Partitioner | _Shards:
    if config.partitioner == "iid":
        return _Shards(num_partitions)
    from flwr_datasets import partitioner

    if config.partitioner == "dirichlet":
        return partitioner.DirichletPartitioner(
            num_partitions=num_partitions,
            partition_by="key",
            alpha=config.dirichlet_alpha,
            min_partition_size=0,  # it gives up after ten draws; an empty device is legitimate
            seed=seed,
        )
    if config.partitioner == "size":
        by_size = {
            "linear": partitioner.LinearPartitioner,
            "square": partitioner.SquarePartitioner,
            "exponential": partitioner.ExponentialPartitioner,
        }
        return by_size[config.size_skew](num_partitions=num_partitions)
    # One key a device: a whole group of values, or a share of the rows of one value.
    return partitioner.PathologicalPartitioner(
        num_partitions=num_partitions,
        partition_by="key",
        num_classes_per_partition=1,
        class_assignment_mode="first-deterministic",
        seed=seed,
    )


def _too_small(config: DataConfig, rows: int, num_partitions: int) -> str:
    how: str = config.partitioner
    if how == "size":
        how += f" (size-skew = {config.size_skew}; the smallest device would get nothing)"
    if how == "column":
        how += f" (partition-column = {config.partition_column})"
    return (
        f"data.partitioner = {how}: the pool's {rows} rows are too few for {num_partitions} devices"
    )
