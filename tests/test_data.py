"""Data: counts, classes, disjointness, determinism, and errors that keep texts to themselves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from privtune_flwr.assets import asset_folder, model_folder
from privtune_flwr.config import DataConfig
from privtune_flwr.data import (
    DataError,
    device_part,
    load_public_dataset,
    load_public_text,
    load_source,
    split_source,
    tokenise,
)
from privtune_flwr.data.partition import _partitioner


def config(**values) -> DataConfig:
    return DataConfig.model_validate(values)


def class_counts(dataset: datasets.Dataset) -> dict[str, int]:
    names = dataset.features["label"].names
    return {names[label]: n for label, n in sorted(Counter(dataset["label"]).items())}


@pytest.fixture(scope="module")
def movies():
    return load_source("movie-snippets")


@pytest.fixture(scope="module")
def newsgroups():
    return load_source("20newsgroups")


# packaged sources


def test_movie_snippets(movies):
    assert class_counts(movies) == {"negative": 5061, "positive": 4982}
    assert movies.features["label"].names == ["negative", "positive"]
    assert movies.features["text"] == datasets.Value("string")
    assert movies[0]["text"].startswith("The Rock is destined to be the 21st Century's new")
    # thresholds, row by row, against the file itself
    path = asset_folder("snippets") / "movieReviewSnippets_GroundTruth.txt"
    rows = [line.split("\t") for line in path.read_text("utf-8").splitlines()]
    kept = iter(zip(movies["text"], movies["label"], strict=True))
    for _, rating, text in rows:
        if abs(float(rating)) > 0.5:
            assert next(kept) == (text.strip(), int(float(rating) > 0))
    assert next(kept, None) is None


def test_bbc_news_keeps_the_headline():
    news = load_source("bbc-news")
    counts = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
    assert class_counts(news) == counts
    assert all(r["text"].startswith(r["headline"]) and len(r["headline"]) > 5 for r in news)
    assert "\ufffd" not in "".join(news["text"])
    by_headline = load_source("bbc-news", text_column="headline")
    assert by_headline["text"][:] == news["headline"][:]


def test_newsgroups_have_their_official_split(newsgroups):
    assert Counter(newsgroups["split"]) == {"train": 11293, "test": 7528}
    assert len(class_counts(newsgroups)) == 20


def test_election_tweets_do_not_name_their_author():
    tweets = load_source("election-tweets")
    assert class_counts(tweets) == {"Clinton": 2624, "Trump": 2595}
    together = "\n".join(tweets["text"])
    assert not re.search(r"https?://|t\.co/|@\w|^RT\b\s*@|&amp;", together, re.MULTILINE)
    assert all(text == " ".join(text.split()) and text for text in tweets["text"])


def test_public_corpora():
    assert [len(load_public_text([n])) for n in ("amazon-snippets", "nyt-snippets", "tweets")] == [
        3708,
        5190,
        4200,
    ]
    both = load_public_text(["nyt-snippets", "tweets"])
    assert both == load_public_text(["nyt-snippets"]) + load_public_text(["tweets"])
    labelled = load_public_dataset(["amazon-snippets", "tweets"])
    assert class_counts(labelled) == {"negative": 1218 + 1062, "positive": 1725 + 2300}
    assert Counter(labelled["corpus"]) == {"amazon-snippets": 2943, "tweets": 3362}
    for names in (["movie-snippets"], [], ["tweets", "tweets"]):
        with pytest.raises(DataError, match="public corpora"):
            load_public_text(names)


def test_unknown_source_lists_the_known_ones():
    with pytest.raises(DataError, match=r"nope: unknown source.*movie-snippets.*hub:NAME"):
        load_source("nope")


def test_given_class_names_set_the_order_of_a_packaged_source():
    swapped = load_source("movie-snippets", labels=("positive", "negative"))
    assert swapped[0]["label"] == 0
    with pytest.raises(DataError, match="5061 of 10043 rows"):
        load_source("movie-snippets", labels=("positive", "other"))


# a device's own file

ROWS = [
    {"body": " first SECRET ", "mood": "good", "author": "a", "text": "unused"},
    {"body": "second SECRET", "mood": "bad", "author": "b", "text": "unused"},
    {"body": "   ", "mood": "bad", "author": "b", "text": "unused"},
    {"body": 'third\nSECRET, "quoted"', "mood": "good", "author": "a", "text": "unused"},
]


def write(path: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_pandas().to_csv(path, index=False)
    return f"file:{path}"


@pytest.fixture(params=[".csv", ".jsonl", ".parquet"])
def path(request, tmp_path):
    return tmp_path / f"private{request.param}"


def test_file_is_loaded_and_cleaned(path):
    dataset = load_source(write(path, ROWS), text_column="body", label_column="mood")
    assert dataset["text"][:] == ["first SECRET", "second SECRET", 'third\nSECRET, "quoted"']
    assert dataset["label"][:] == [1, 0, 1]
    assert dataset.features["label"].names == ["bad", "good"]
    assert dataset["author"][:] == ["a", "b", "a"]
    assert dataset.column_names == ["text", "label", "author"]


def test_nothing_of_a_file_is_copied_to_disk(path, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    source = write(path, ROWS)
    dataset = load_source(source, text_column="body", label_column="mood")
    split = split_source(
        dataset, config(train_examples=2, eval_examples=1, test_source="none"), seed=0
    )
    part = device_part(split.pool, config(), partition_id=0, num_partitions=1, seed=0)
    assert [d.cache_files for d in (dataset, split.pool, part.train)] == [[], [], []]
    assert [p for p in tmp_path.rglob("*") if p != path] == []


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([3, 10, 3], (), ["3", "10"]),
        ([1, 0, 1], ("no", "yes"), ["no", "yes"]),
        ([1, 0, 1], ("0", "1", "2"), ["0", "1", "2"]),
        (["b", "a", "b"], ("b", "a"), ["b", "a"]),
        ([True, False, True], (), ["false", "true"]),
    ],
)
def test_labels_of_every_kind(path, labels, names, expected):
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    if path.suffix == ".csv" and labels[0] is True:
        expected = ["False", "True"]  # a CSV file holds what was written into it
    dataset = load_source(write(path, rows), labels=names)
    assert dataset.features["label"].names == expected
    if names:
        first = names.index(labels[0]) if isinstance(labels[0], str) else labels[0]
        assert dataset["label"][0] == first
    assert dataset["label"][0] == dataset["label"][2] != dataset["label"][1]


def row(text="SECRET text", label="SECRET label"):
    return {"text": text, "label": label}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"text_column": "txt"}, r"no column 'txt'; there are: body, mood, author, text"),
        (ROWS, {"text_column": "body"}, r"no column 'label'; there are: body, mood"),
        ([row(""), row("  ")], {}, r"column 'text' holds no text in any row"),
        ([row(), row(label="")], {}, r"column 'label': 1 of 2 rows have no label"),
        ([row(), row("x", "a"), row("y", "b")], {"labels": ("a", "b")}, r"1 of 3 rows .* a, b$"),
        ([row(), row()], {}, r"one class only"),
        ([row(), row()], {"labels": ("a", "a")}, r"repeat: a, a"),
        ([row(label=f"SECRET {i}") for i in range(1001)], {}, r"1001 different values"),
    ],
)
def test_bad_rows_are_refused_without_showing_them(path, rows, options, message):
    with pytest.raises(DataError, match=message) as error:
        load_source(write(path, rows), **options)
    assert "SECRET" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_must_be_text_and_labels_discrete(tmp_path, suffix):
    source = write(tmp_path / f"x{suffix}", [{"text": 4711, "label": 0.5}] * 2)
    with pytest.raises(DataError, match=r"column 'text' is of type int64; it must hold text"):
        load_source(source)
    source = write(tmp_path / f"y{suffix}", [{"text": "SECRET", "label": 4711.5}] * 2)
    with pytest.raises(DataError, match=r"column 'label' is of type double") as error:
        load_source(source)
    assert "4711" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            b"text,label\nSECRET,a\nSECRET,a,b\n",
            r"as csv, at row 3: expected 2 columns, found 3",
        ),
        ("x.csv", b"", r"empty"),
        ("x.csv", b"text,label\n\xff\xfeSECRET,a\n", r"it is not UTF-8"),
        ("x.jsonl", b'{"text": "SECRET"}\n{"text": SECRET}\n', r"as jsonl"),
        ("x.jsonl", b'{"text": "SECRET"}\n{"text": 1}\n', r"not all of one type"),
        ("x.parquet", b"SECRET SECRET SECRET", r"as parquet"),
        ("x.txt", b"SECRET", r"unknown extension '.txt'; allowed: .csv, .jsonl, .parquet"),
    ],
)
def test_broken_files_say_where_but_not_what(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_source(f"file:{tmp_path / name}")
    assert "SECRET" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


def test_missing_and_relative_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_source(f"file:{tmp_path / 'gone.csv'}")
    with pytest.raises(DataError, match="must be absolute"):
        load_source("file:gone.csv")


# a hub


def test_hub_class_labels_are_kept(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        features = {
            "sentence": datasets.Value("string"),
            "y": datasets.ClassLabel(names=["z", "a"]),
        }
        rows = {"sentence": ["one", "two", ""], "y": [0, 1, -1]}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = load_source("hub:owner/name:part", text_column="sentence", label_column="y")
    assert asked == [("owner/name", "part", "train")]
    assert dataset.features["label"].names == ["z", "a"]
    assert dataset["label"][:] == [0, 1]  # the unlabelled row had no text


def test_hub_rows_without_label_are_refused(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    hidden = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hidden)
    with pytest.raises(DataError, match="2 of 2 rows have no label"):
        load_source("hub:x")


def test_hub_failure_is_a_data_error(monkeypatch):
    def load(*_, **__):
        raise ConnectionError("Couldn't reach it\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = datasets.are_progress_bars_disabled()
    with pytest.raises(DataError, match=r"hub:x: cannot load its train split: Couldn't reach it$"):
        load_source("hub:x")
    assert datasets.are_progress_bars_disabled() == before


# splits


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


# tokens


def test_tokens_are_ragged_truncated_and_bracketed():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm"))
    texts = ["A film.", "word " * 500]
    short, long = tokenise(tokenizer, texts, 16)
    assert tokenizer.convert_ids_to_tokens(short) == ["[CLS]", "a", "film", ".", "[SEP]"]
    assert (short.dtype, long.shape) == (np.int32, (16,))
    assert (long[0], long[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    # the tokenizer file asks for 128 at most and pads to 128: neither may reach the caller
    assert len(tokenise(tokenizer, texts, 200)[1]) == 200
    assert tokenise(tokenizer, [], 16) == []
    with pytest.raises(ValueError, match="1 of 1 texts have no tokens"):
        tokenise(lambda *_, **__: {"input_ids": [[]]}, ["x"], 16)
