"""A federation inside one process: what devices would release, in a run folder as a run leaves it.

No message is sent, but the text, its order, the noise and its keys are those of the simulated
devices, made by the same functions, so that the auditor opens the folder as any run's. Clean
representations do not depend on the mechanism: they are kept on disk by their text.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from privtune_flwr.cloud import TEST_DEVICE, CloudSide, prepare_cloud
from privtune_flwr.codec import get_codec
from privtune_flwr.config import RunConfig
from privtune_flwr.data import tokenise
from privtune_flwr.device import DeviceHome, Holdings, open_holdings, open_home, simulated_root
from privtune_flwr.models import BottomModel
from privtune_flwr.privacy.mods import perturb
from privtune_flwr.protocol import ReleaseRequest
from privtune_flwr.results.run_folder import RunFolder, open_run_folder
from privtune_flwr.training.plan import Ask, Plan, make_plan
from privtune_flwr.training.store import Example, SmashedStore
from strategies.intake import terms_of

_KEPT_TOKENS = 500  # what is smaller is encoded again: a file for each would cost more


class RememberedBottom(BottomModel):
    """A bottom model that keeps on disk what it encoded, by the hash of weights and tokens.

    Parameters
    ----------
    bottom : BottomModel
        Shares its weights.
    bottom_id : str
        Hash of its bundle.
    folder : Path
        Created on demand. Same list, same batches, hence the same bytes as without it.
    """

    def __init__(self, bottom: BottomModel, bottom_id: str, folder: Path) -> None:
        super().__init__(bottom.base, bottom.tokenizer)
        self._id, self._kept = bottom_id, folder

    def encode(
        self, sequences: Sequence[npt.NDArray[np.integer[Any]]], batch_tokens: int = 4096
    ) -> list[npt.NDArray[np.float32]]:
        """Encode, or read what was encoded before; see :meth:`BottomModel.encode`."""
        lengths = [len(s) for s in sequences]
        if sum(lengths) < _KEPT_TOKENS:
            return super().encode(sequences, batch_tokens)
        told = f"{self._id}/{batch_tokens}/{lengths}".encode()
        digest = hashlib.sha256(told + np.concatenate(sequences).astype("<i4").tobytes())
        path = self._kept / f"{digest.hexdigest()[:32]}.npy"
        if not path.exists():
            self._kept.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{time.monotonic_ns()}.tmp")
            with draft.open("wb") as file:
                np.save(file, np.concatenate(super().encode(sequences, batch_tokens)))
            draft.replace(path)
        rows_ND = np.load(path, allow_pickle=False)
        return np.split(rows_ND, np.cumsum(lengths)[:-1])


@dataclass
class Stopwatch:
    """Adds up seconds by stage: of the clock, and of the processor, which others do not slow."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            spent, worked = time.perf_counter() - start, time.process_time() - cpu
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + worked


@dataclass(frozen=True)
class Device:
    """One simulated device: its home (secret, policy) and its text."""

    home: DeviceHome
    holdings: Holdings

    @property
    def name(self) -> str:
        """Its public name, as in the store."""
        return self.home.device_id


def open_devices(config: RunConfig, run_id: str, count: int) -> list[Device]:
    """Open the devices of a run; their secrets follow from the run's seed alone."""
    devices = []
    for number in range(count):
        node = {"partition-id": number, "num-partitions": count}
        home = open_home(node, run_id=run_id, simulated=True, seed=config.run.seed)
        devices.append(Device(home, open_holdings(config, node, home)))
    return devices


@dataclass
class LocalRun:
    """A run whose devices answer in this process.

    Attributes
    ----------
    cloud : CloudSide
        Its mechanism is the one that devices load.
    folder : RunFolder
        With ``config.json``, ``devices.json`` and, after :meth:`release`, the store.
    devices : list of Device
    """

    cloud: CloudSide
    folder: RunFolder
    devices: list[Device]
    watch: Stopwatch
    noise_norm_sum: float = 0.0
    tokens: int = 0
    wire_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config: RunConfig = self.cloud.config
        self.labels: tuple[str, ...] = self.devices[0].holdings.label_names
        counts = {
            "train": {d.name: len(d.holdings.train.texts) for d in self.devices},
            "evaluation": {d.name: len(d.holdings.evaluation.texts) for d in self.devices},
        }
        self.folder.write_json(
            "devices.json", {**counts, "labels": list(self.labels), "nodes": len(self.devices)}
        )
        self.plan: Plan = make_plan(counts["train"], counts["evaluation"], self.config)

    def open_store(self) -> SmashedStore:
        """Open the store with the cloud's decoder, once the mechanism is final."""
        self.store = self.cloud.open_store(self.folder.store)
        return self.store

    def release(self, asks: Iterable[Ask]) -> list[Example]:
        """Release chunks as their devices would, and give them as the cloud trains on them."""
        by_name = {d.name: d for d in self.devices}
        examples: list[Example] = []
        for ask in asks:
            rows_ND, lengths_B, labels = self._chunk(by_name[ask.device], ask)
            shared = labels if ask.split == "train" else None
            self.store.append(ask.key, rows_ND, lengths_B.tolist(), shared)
            stored = self.store.examples(ask.key)
            examples += [replace(e, label=v) for e, v in zip(stored, labels, strict=True)]
        return examples

    def release_training(self) -> list[Example]:
        """Release all training chunks in the order of the plan's rounds."""
        return self.release(ask for round_ in self.plan.rounds for ask in round_.asks)

    def release_validation(self) -> list[Example]:
        """Release the devices' evaluation examples.

        The examples carry their labels, for a study that holds outputs against them as the devices
        would; the store gets none of these.
        """
        return self.release(ask for wave in self.plan.evaluation for ask in wave)

    def release_test(self) -> list[Example]:
        """Send the public test set through the mechanism, as a run does."""
        self.cloud.add_test_set(self.store, self.labels)
        keys = sorted(c.key for c in self.store if c.device == TEST_DEVICE)
        return [example for key in keys for example in self.store.examples(key)]

    def close(self, final: dict[str, float]) -> None:
        """Write what the auditor reads of a finished run beside its store.

        Parameters
        ----------
        final : dict
            ``test_accuracy`` and the like.
        """
        self.folder.write_jsonl("rounds.jsonl", [{"round": 1, "kind": "train", **final}])
        traffic = {name: {"up": sent} for name, sent in self.wire_bytes.items()}
        self.folder.write_json("results.json", {"final": final, "traffic": {"devices": traffic}})

    def request(self, ask: Ask) -> ReleaseRequest:
        """Give what a device would be asked; its ``release_key`` keys the noise."""
        privacy = self.config.privacy
        return ReleaseRequest(
            **terms_of(self.cloud, self.folder.run_id),
            split=ask.split,
            chunk=ask.chunk,
            chunk_size=privacy.chunk_size,
            epoch=ask.epoch,
            wire=privacy.wire,
            max_length=self.config.model.max_length,
        )

    def _chunk(
        self, device: Device, ask: Ask
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint16], list[int]]:
        request = self.request(ask)
        chunk = device.holdings.chunk(ask.split, ask.chunk, request.chunk_size)
        ids = tokenise(self.cloud.bottom.tokenizer, chunk.texts, request.max_length)
        with self.watch.stage("encode"):
            hidden_ND = np.concatenate(self.cloud.bottom.encode(ids))
        lengths_B = np.array([len(i) for i in ids], dtype=np.uint16)
        with self.watch.stage("perturb"):
            rows_ND = perturb(
                hidden_ND,
                lengths_B,
                np.concatenate(ids),
                self.cloud.mechanism,
                device.home,
                request,
            )
        if rows_ND.shape == hidden_ND.shape:
            norms_N = np.linalg.norm(rows_ND - hidden_ND, axis=1)
            self.noise_norm_sum += float(norms_N.sum(dtype=np.float64))
        codec = get_codec(request.wire)
        arrays = codec.encode(rows_ND, lengths_B)
        self.tokens += len(rows_ND)
        sent = self.wire_bytes.get(device.name, 0) + sum(a.nbytes for a in arrays.values())
        self.wire_bytes[device.name] = sent
        return codec.decode(arrays, lengths_B), lengths_B, chunk.labels


@contextmanager
def local_run(
    config: RunConfig, devices: int, cache: Path, watch: Stopwatch | None = None
) -> Iterator[LocalRun]:
    """Prepare the cloud and open the devices of a new run folder.

    Parameters
    ----------
    config : RunConfig
        ``run.folder`` and ``run.name`` say where; what an earlier try left there is removed.
    devices : int
        How many.
    cache : Path
        For clean representations.
    watch : Stopwatch, optional
        Told how long preparation took.
    """
    watch = watch or Stopwatch()
    shutil.rmtree(Path(config.run.folder) / config.run.name, ignore_errors=True)
    with watch.stage("prepare"):
        cloud = prepare_cloud(config)
        cloud.bottom = RememberedBottom(cloud.bottom, cloud.bottom_id, cache)
    folder = open_run_folder(config)
    try:
        opened = open_devices(config, folder.run_id, devices)
        yield LocalRun(cloud, folder, opened, watch)
    finally:
        folder.lock.release()
        shutil.rmtree(simulated_root(folder.run_id), ignore_errors=True)
