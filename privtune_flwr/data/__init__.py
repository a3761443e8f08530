"""Text: sources, splits, partitions, tokens, and the public corpora."""

from privtune_flwr.data.columns import DataError
from privtune_flwr.data.partition import DeviceData, device_part
from privtune_flwr.data.public import (
    Labelled,
    load_public_dataset,
    load_public_labelled,
    load_public_text,
)
from privtune_flwr.data.sources import load_source
from privtune_flwr.data.splits import Split, split_source
from privtune_flwr.data.tokenise import tokenise

__all__ = [
    "DataError",
    "DeviceData",
    "Labelled",
    "Split",
    "device_part",
    "load_public_dataset",
    "load_public_labelled",
    "load_public_text",
    "load_source",
    "split_source",
    "tokenise",
]
