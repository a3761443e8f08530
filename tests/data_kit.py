"""What the tests of data share: settings, counts, and files as a device would have them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet

from privtune_flwr.config import DataConfig


def config(**values) -> DataConfig:
    return DataConfig.model_validate(values)


def class_counts(dataset: datasets.Dataset) -> dict[str, int]:
    names = dataset.features["label"].names
    return {names[label]: n for label, n in sorted(Counter(dataset["label"]).items())}


def write(path: Path, rows: list[dict]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_pandas().to_csv(path, index=False)
    return f"file:{path}"
