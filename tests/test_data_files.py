"""A device's own file and a hub's dataset: cleaned, refused, never shown or copied."""

from __future__ import annotations

import datasets
import pytest
from data_kit import config, write

from privtune_flwr.data import (
    DataError,
    device_part,
    load_source,
    split_source,
)

ROWS = [
    {"body": " first SECRET ", "mood": "good", "author": "a", "text": "unused"},
    {"body": "second SECRET", "mood": "bad", "author": "b", "text": "unused"},
    {"body": "   ", "mood": "bad", "author": "b", "text": "unused"},
    {"body": 'third\nSECRET, "quoted"', "mood": "good", "author": "a", "text": "unused"},
]


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
