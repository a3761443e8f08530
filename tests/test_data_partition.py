"""Splits and devices' parts: disjoint, exact, skewed as asked, the same in every process."""

from __future__ import annotations

import subprocess
import sys

import datasets
import numpy as np
import pytest
from data_kit import config, write

from privtune_flwr.data import (
    DataError,
    device_part,
    split_source,
)
from privtune_flwr.data.partition import _partitioner


def test_held_out_split_is_disjoint_and_seeded(movies):
    one, again = (split_source(movies, config(), seed=1) for _ in range(2))
    other = split_source(movies, config(), seed=2)
    assert (len(one.pool), len(one.test)) == (3600, 2000)
    assert one.pool["text"][:] == again.pool["text"][:]
    assert one.test["text"][:] == again.test["text"][:]
    assert one.pool["text"][:] != other.pool["text"][:]
    assert not set(one.pool["text"]) & set(one.test["text"])
    # sorted by class in the file: a shuffle must have mixed both parts
    for part in (one.pool, one.test):
        assert 0.45 < np.mean(part["label"]) < 0.55


def toy(texts: list[str]) -> datasets.Dataset:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    labels = [i % 2 for i in range(len(texts))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_duplicates_of_test_texts_leave_the_pool():
    dataset = toy([f"Text  {i // 4}" if i % 2 else f"text {i // 4}" for i in range(40)])
    settings = config(train_examples=0, eval_examples=0, test_examples=5)
    split = split_source(dataset, settings, seed=0)
    held = {text.lower().replace("  ", " ") for text in split.test["text"]}
    kept = {text.lower().replace("  ", " ") for text in split.pool["text"]}
    assert not held & kept
    assert len(split.pool) == 40 - 4 * len(held)


def test_official_test_split_is_used(newsgroups):
    settings = config(source="20newsgroups", test_examples=500)
    split = split_source(newsgroups, settings, seed=0)
    assert set(split.test["split"]) == {"test"}
    assert set(split.pool["split"]) == {"train"}
    assert (len(split.pool), len(split.test)) == (3600, 500)
    every = split_source(newsgroups, config(source="20newsgroups", test_examples=9999), seed=0)
    assert len(every.test) == 7528


def test_no_test_and_all_that_is_left(movies):
    settings = config(test_source="none", train_examples=0)
    split = split_source(movies, settings, seed=0)
    assert split.test is None
    assert len(split.pool) == len(movies)
    assert split_source(movies, config(test_examples=0), seed=0).test is None


def test_another_source_as_test(tmp_path, movies):
    rows = [{"text": movies["text"][0].upper(), "label": "positive"}]
    rows += [{"text": f"new {i}", "label": "negative"} for i in range(5)]
    source = write(tmp_path / "t.jsonl", rows)
    settings = config(test_source=source, train_examples=0, eval_examples=0)
    split = split_source(movies, settings, seed=0)
    assert len(split.test) == 6
    assert split.test.features["label"] == movies.features["label"]
    assert len(split.pool) == len(movies) - 1
    assert movies["text"][0] not in split.pool["text"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_examples": 9000},
            r"data.train-examples = 9000 .* need 9400 rows; 80\d\d of 10043",
        ),
        ({"test_examples": 20000}, r"data.test-examples = 20000 leaves nothing"),
        ({"train_examples": 0, "eval_examples": 9000}, r"need 9001 rows"),
    ],
)
def test_too_few_rows_name_the_keys(movies, settings, message):
    with pytest.raises(DataError, match=message):
        split_source(movies, config(**settings), seed=0)


# partitions


@pytest.fixture(scope="module")
def pool(movies):
    return split_source(movies, config(), seed=0).pool


def parts(pool, settings, num_partitions, seed=0):
    return [
        device_part(pool, settings, partition_id=i, num_partitions=num_partitions, seed=seed)
        for i in range(num_partitions)
    ]


def test_equal_parts_are_those_of_flwr_datasets(pool):
    from flwr_datasets.partitioner import IidPartitioner

    ours, theirs = _partitioner(config(), 7, 0), IidPartitioner(7)
    ours.dataset = theirs.dataset = pool
    for number in range(7):
        assert ours.load_partition(number)["text"] == theirs.load_partition(number)["text"]


@pytest.mark.parametrize("num_partitions", [1, 7, 10])
@pytest.mark.parametrize(
    "settings",
    [
        {"partitioner": "iid"},
        {"partitioner": "dirichlet", "dirichlet_alpha": 0.1},
        {"partitioner": "column", "partition_column": "label"},
        {"partitioner": "size", "size_skew": "linear"},
        {"partitioner": "size", "size_skew": "square"},
    ],
)
def test_parts_are_disjoint_and_cover_the_pool(pool, settings, num_partitions):
    numbered = pool.add_column("number", list(range(len(pool))))
    devices = parts(numbered, config(**settings), num_partitions)
    rows = [n for d in devices for part in (d.train, d.evaluation) for n in part["number"]]
    assert sorted(rows) == list(range(len(pool)))
    assert sum(len(d.evaluation) for d in devices) == 400
    assert sum(len(d.train) for d in devices) == 3200


def test_iid_totals_are_exact(pool):
    assert {(len(d.train), len(d.evaluation)) for d in parts(pool, config(), 10)} == {(320, 40)}
    for i in (0, 1, 99, 199):
        one = device_part(pool, config(), partition_id=i, num_partitions=200, seed=0)
        assert (len(one.train), len(one.evaluation)) == (16, 2)


def test_sizes_and_labels_are_skewed_as_asked(pool):
    linear = parts(pool, config(partitioner="size"), 10)
    sizes = [len(d.train) + len(d.evaluation) for d in linear]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 8 * sizes[0]
    iid = [np.mean(d.train["label"]) for d in parts(pool, config(), 10)]
    skewed = config(partitioner="dirichlet", dirichlet_alpha=0.1)
    dirichlet = [np.mean(d.train["label"]) for d in parts(pool, skewed, 10) if len(d.train)]
    assert np.std(iid) < 0.06
    assert np.std(dirichlet) > 0.2


def test_dirichlet_with_many_devices_may_leave_some_empty(pool):
    skewed = config(partitioner="dirichlet", dirichlet_alpha=0.05)
    devices = [
        device_part(pool, skewed, partition_id=i, num_partitions=200, seed=0)
        for i in range(0, 200, 20)
    ]
    sizes = [len(d.train) + len(d.evaluation) for d in devices]
    assert min(sizes) == 0
    assert max(sizes) > 18


def test_column_keeps_a_value_on_one_device(pool):
    authors = pool.add_column("author", [f"author {i % 23}" for i in range(len(pool))])
    settings = config(partitioner="column", partition_column="author")
    held = [
        set(d.train["author"]) | set(d.evaluation["author"]) for d in parts(authors, settings, 5)
    ]
    assert sorted(map(len, held)) == [4, 4, 5, 5, 5]
    assert len(set().union(*held)) == 23
    # fewer values than devices: a device holds some rows of one value
    for device in parts(pool, config(partitioner="column", partition_column="label"), 10):
        assert len(set(device.train["label"])) == 1


def test_partition_errors_name_the_keys(pool):
    cases = [
        ({"partitioner": "column", "partition_column": "who"}, 10, r"'who': no such column.*label"),
        ({"partitioner": "size"}, 200, r"size-skew = linear.*3600 rows are too few for 200"),
        ({"partitioner": "dirichlet"}, 4000, r"dirichlet: the pool's 3600 rows are too few"),
    ]
    for settings, count, message in cases:
        with pytest.raises(DataError, match=message):
            device_part(pool, config(**settings), partition_id=0, num_partitions=count, seed=0)
    with pytest.raises(DataError, match="partition 10 does not exist"):
        device_part(pool, config(), partition_id=10, num_partitions=10, seed=0)
    with pytest.raises(DataError, match="no rows"):
        device_part(pool.select([]), config(), partition_id=0, num_partitions=1, seed=0)


CHILD = """
import hashlib
from privtune_flwr.config import DataConfig
from privtune_flwr.data import device_part, load_source, split_source
for kind in ("iid", "dirichlet"):
    config = DataConfig(partitioner=kind)
    pool = split_source(load_source("movie-snippets"), config, seed=3).pool
    part = device_part(pool, config, partition_id=4, num_partitions=10, seed=3)
    text = "|".join(part.train["text"]) + "#" + "|".join(part.evaluation["text"])
    print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_parts_are_the_same_in_every_process():
    command = [sys.executable, "-c", CHILD]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    one, other = (process.communicate(timeout=60)[0].split() for process in both)
    assert one == other
    assert len(set(one)) == 2
