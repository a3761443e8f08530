"""What the operator of a simulation knows: the text behind every released row.

Only a simulation has such an operator. On real devices nobody can build this, which is the point.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privtune_flwr.cloud import CloudSide, prepare_cloud
from privtune_flwr.config import RunConfig, load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.device import Chunk, open_holdings, open_home, simulated_root
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.learned import adopt_learned
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.training.store import Key, SmashedStore

_SIMULATED = re.compile(r"device-\d{5}")
_SAME = 0.05  # share of a row's variance that two equal releases may differ by


class AuditError(PrivTuneError, ValueError):
    """A run that cannot be audited as asked; the message says why and what would do."""


@dataclass(frozen=True)
class ReleasedText:
    """Released rows beside what they were made from.

    Attributes
    ----------
    rows : list of float32 arrays (T, d)
        What the cloud received, one array a sentence.
    ids : list of int32 arrays (T,)
        The true token ids.
    texts : list of str
        The sentences.
    labels : list of int
        Their classes.
    keys : list of (device, chunk, position)
        Where each stands in the store; empty for text that no device released.
    """

    rows: list[npt.NDArray[np.float32]]
    ids: list[npt.NDArray[np.int32]]
    texts: list[str]
    labels: list[int]
    keys: list[tuple[str, int, int]]


def open_run(folder: Path) -> tuple[RunConfig, CloudSide, SmashedStore]:
    """Open a finished run as its cloud held it, without the decoder.

    Raises
    ------
    AuditError
        If the folder holds no run that has received anything.
    """
    if not (folder / "config.json").is_file() or not (folder / "store" / "index.jsonl").is_file():
        raise AuditError(f"{folder}: not a run folder with a smashed store")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = load_run_config(saved["config"])
    cloud = prepare_cloud(config)
    adopt_learned(cloud, folder)
    store = SmashedStore(folder / "store", hidden=cloud.width, dtype=cloud.store_dtype)
    if not any(c.split == "train" for c in store):
        raise AuditError(f"{folder}: no device released anything")
    return config, cloud, store


def is_simulation(store: SmashedStore) -> bool:
    """Whether every device was a simulated one, whose text the operator can look up."""
    devices = {c.device for c in store if c.split == "train"}
    return bool(devices) and all(_SIMULATED.fullmatch(device) for device in devices)


def released_text(
    config: RunConfig, cloud: CloudSide, store: SmashedStore, *, sentences: int, seed: int = 0
) -> ReleasedText:
    """Draw released training sentences and look their tokens up.

    Parameters
    ----------
    config, cloud, store
        From :func:`open_run`; the run must be a simulation.
    sentences : int
        How many to draw at random; fewer if fewer were released.
    seed : int
        Of the draw.

    Raises
    ------
    AuditError
        If the text does not fit what was released.
    """
    chunks = [c for c in store if c.split == "train" and c.epoch == 0]
    pairs = [(c, i) for c in chunks for i in range(len(c.lengths))]
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:sentences]
    by_chunk: dict[Key, list[int]] = {}
    for index in drawn:
        chunk, position = pairs[int(index)]
        by_chunk.setdefault(chunk.key, []).append(position)
    found = ReleasedText([], [], [], [], [])
    held = training_text(config, store)
    for key, positions in sorted(by_chunk.items()):
        start = key[3] * config.privacy.chunk_size
        for position in positions:
            found.texts.append(held[key[0]].train.texts[start + position])
            found.labels.append(held[key[0]].train.labels[start + position])
            found.rows.append(stored_rows(store, key, position))
            found.keys.append((key[0], key[3], position))
    found.ids.extend(tokenise(cloud.bottom.tokenizer, found.texts, config.model.max_length))
    check_lengths(found)
    _check_release(found, {d: h.noise_key for d, h in held.items()}, config, cloud)
    return found


def check_lengths(found: ReleasedText) -> None:
    """Refuse text that cannot be what was released."""
    if [len(r) for r in found.rows] != [len(i) for i in found.ids]:
        raise AuditError("the run's text is not what its devices released; was its source changed?")


def _check_release(
    found: ReleasedText, noise_keys: dict[str, bytes], config: RunConfig, cloud: CloudSide
) -> None:
    """Release one sentence of each device again: rows and text must belong together."""
    first = {key[0]: index for index, key in reversed(list(enumerate(found.keys)))}
    release_key = f"{cloud.bottom_id}/{cloud.spec.id}/{config.model.max_length}/0"
    for device, index in first.items():
        ids, rows = found.ids[index], found.rows[index]
        rng = keyed_generator(noise_keys[device], release_key, ids.astype("<i4").tobytes())
        again = cloud.mechanism.perturb(cloud.bottom.encode([ids])[0], ids, rng)
        # the wire's rounding and another batch's arithmetic are far below this
        if np.square(again - rows).mean() > _SAME * np.square(again - again.mean()).mean():
            raise AuditError(
                f"{device}: its text, released again, is not what the store holds; was the run's "
                "source or the project changed since?"
            )


def stored_rows(store: SmashedStore, key: Key, position: int) -> npt.NDArray[np.float32]:
    """Read one sentence's rows, (T, d)."""
    example = store.examples(key)[position]
    rows = store.received()[example.offset : example.offset + example.length]
    return np.array(rows, dtype=np.float32)


@dataclass(frozen=True)
class HeldText:
    """A simulated device's training text in the order of its release, and the key of its noise."""

    train: Chunk
    noise_key: bytes


def training_text(config: RunConfig, store: SmashedStore) -> dict[str, HeldText]:
    """Give what each simulated device held.

    A simulated device's secret follows from the run's seed, so the operator can repeat its order
    and its noise.
    """
    devices = sorted({c.device for c in store if c.split == "train"})
    described = json.loads((store.folder.parent / "devices.json").read_text(encoding="utf-8"))
    run_id = uuid.uuid4().hex
    try:
        return {d: _held(config, d, int(described["nodes"]), run_id) for d in devices}
    finally:
        shutil.rmtree(simulated_root(run_id), ignore_errors=True)


def _held(config: RunConfig, device: str, partitions: int, run_id: str) -> HeldText:
    node: dict[str, Any] = {
        "partition-id": int(device.removeprefix("device-")),
        "num-partitions": partitions,
    }
    home = open_home(node, run_id=run_id, simulated=True, seed=config.run.seed)
    return HeldText(open_holdings(config, node, home).train, home.derive("noise"))


def class_names(folder: Path) -> Sequence[str]:
    """Names of the run's classes in order of their ids."""
    described = json.loads((folder / "devices.json").read_text(encoding="utf-8"))
    return [str(name) for name in described["labels"]]
