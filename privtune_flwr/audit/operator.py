"""What the operator of a simulation knows: the text behind every released row.

Only a simulation has such an operator. On real devices nobody can build this, which is the point.
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privtune_flwr.cloud import CloudSide, prepare_cloud
from privtune_flwr.config import RunConfig, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device import open_holdings, open_home, simulated_root
from privtune_flwr.training.store import Key, SmashedStore


@dataclass(frozen=True)
class ReleasedText:
    """Released training rows beside the tokens they were made from.

    Attributes
    ----------
    rows : list of arrays (T, d)
        What the cloud received, one array a sentence.
    ids : list of int32 arrays (T,)
        The true token ids.
    """

    rows: list[npt.NDArray[Any]]
    ids: list[npt.NDArray[np.int32]]


def open_run(folder: Path) -> tuple[RunConfig, CloudSide, SmashedStore]:
    """Open a finished run as its cloud held it, without the decoder."""
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = load_run_config(saved["config"])
    cloud = prepare_cloud(config)
    store = SmashedStore(folder / "store", hidden=cloud.bottom.hidden_size, dtype=cloud.store_dtype)
    return config, cloud, store


def released_text(
    config: RunConfig, cloud: CloudSide, store: SmashedStore, *, sentences: int, seed: int = 0
) -> ReleasedText:
    """Draw released training sentences and look their tokens up.

    Parameters
    ----------
    config, cloud, store
        From :func:`open_run`; the run must be a simulation.
    sentences : int
        How many to draw at random.
    seed : int
        Of the draw.
    """
    chunks = [c for c in store if c.split == "train" and c.epoch == 0]
    devices = sorted({c.device for c in chunks})
    partitions = json.loads((store.folder.parent / "devices.json").read_text())["nodes"]
    pairs = [(c, i) for c in chunks for i in range(len(c.lengths))]
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(pairs))[:sentences]
    by_chunk: dict[Key, list[int]] = {}
    for index in drawn:
        chunk, position = pairs[int(index)]
        by_chunk.setdefault(chunk.key, []).append(position)
    rows, ids = [], []
    received = store.received()
    run_id = uuid.uuid4().hex
    try:
        for device in devices:
            texts = _training_texts(config, device, partitions, run_id)
            for key in (k for k in by_chunk if k[0] == device):
                start = key[3] * config.privacy.chunk_size
                examples = store.examples(key)
                for position in by_chunk[key]:
                    example = examples[position]
                    stop = example.offset + example.length
                    rows.append(np.array(received[example.offset : stop], dtype=np.float32))
                    text = texts[start + position]
                    length = config.model.max_length
                    ids += tokenise(cloud.bottom.tokenizer, [text], length)
                    if len(ids[-1]) != example.length:
                        raise ValueError("the run's text is not what its devices released")
    finally:
        shutil.rmtree(simulated_root(run_id), ignore_errors=True)
    return ReleasedText(rows, ids)


def _training_texts(config: RunConfig, device: str, partitions: int, run_id: str) -> list[str]:
    node = {"partition-id": int(device.removeprefix("device-")), "num-partitions": partitions}
    home = open_home(node, run_id=run_id, simulated=True, seed=config.run.seed)
    return open_holdings(config, node, home).train.texts
