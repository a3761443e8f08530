"""Rounds of learning inside one process, and the lines that a learned release is held against."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

import privtune_flwr.privacy
from privtune_flwr.data import tokenise
from privtune_flwr.learned import (
    FOLDER,
    LearningProgress,
    adopt_learned,
    freeze,
    load_state,
    save_state,
)
from privtune_flwr.privacy.learning import Learner, State
from privtune_flwr.results.run_folder import write_text
from privtune_flwr.training.averaging import Part, federate_in_process
from simulations.frontier.release import Device, LocalRun

_ALONE = 2  # devices that stand for one that learns without the others


@runtime_checkable
class _Judged(Protocol):
    """A learner with a read-out of its own."""

    def accuracy(
        self, state: State, sequences: Sequence[NDArray[np.int32]], labels: Sequence[int]
    ) -> float: ...


def learn(run: LocalRun, kept: Path, *, scored: str) -> dict[str, Any]:
    """Learn a run's mechanism with its devices' text, freeze it and let the cloud adopt it.

    What was learned is kept by all that determines it: a search and its confirmation, or two ways
    of training on the same release, learn once.

    Parameters
    ----------
    run : LocalRun
        With a mechanism that is learned; its cloud then holds the learned one.
    kept : Path
        Where rows share what was learned.
    scored : {"test", "validation"}
        On what the references are judged.

    Returns
    -------
    dict
        ``federated``: accuracy of the learner's own read-out without a cloud; ``alone``: the mean
        over two devices of the same, learned without the others. Empty where a learner has none.
    """
    folder = kept / _identity(run)
    kept.mkdir(parents=True, exist_ok=True)
    own, shared = run.folder.path / FOLDER, folder / FOLDER
    with FileLock(folder.with_suffix(".lock")), run.watch.stage("learn"):
        learner = _StartedOnce(run)
        if not shared.is_dir():
            state = _federate(run, learner, run.devices)
            freeze(run.folder.path, learner, state)
            save_state(run.folder.path, state, LearningProgress(run.cloud.spec.id))
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(own, draft / FOLDER)
            draft.replace(folder)
        else:
            shutil.copytree(shared, own)
        references: dict[str, Any] = {}
        # a search is scored by what the cloud makes of it: its references would only cost time
        if scored == "test" and isinstance(learner.inner, _Judged):
            path = folder / "references.json"
            if not path.exists():
                write_text(path, json.dumps(_references(run, learner)))
            references = json.loads(path.read_text(encoding="utf-8"))
    adopt_learned(run.cloud, run.folder.path)
    return references


def _identity(run: LocalRun) -> str:
    config = run.config
    determined = [
        run.cloud.bottom_id,
        run.cloud.spec.id,
        config.data.model_dump(),
        config.privacy.learning.model_dump(),
        config.model.max_length,
        config.run.seed,
        len(run.devices),
        source_id(Path(privtune_flwr.privacy.__file__).parent),
    ]
    return hashlib.sha256(json.dumps(determined, sort_keys=True).encode()).hexdigest()[:24]


def source_id(folder: Path) -> str:
    """Hash of a package's source: other code, another result."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _StartedOnce:
    """A learner whose start, which may be long, is made once for all who start from it."""

    def __init__(self, run: LocalRun) -> None:
        cloud = run.cloud
        artefact = cloud.bundles[1][1] if cloud.spec.artefact else None
        kind = type(cloud.mechanism)
        self.start_seconds = 0.0
        self.inner: Learner = kind.learner(cloud.spec, artefact, cloud.bottom, len(run.labels))
        self.update, self.apply, self.finish = (
            self.inner.update,
            self.inner.apply,
            self.inner.finish,
        )
        self._started: State | None = None

    def start(self) -> State:
        if self._started is None:
            self._started = self.inner.start()
        return {name: value.copy() for name, value in self._started.items()}


def _references(run: LocalRun, learner: _StartedOnce) -> dict[str, float]:
    judge, saved = learner.inner, load_state(run.folder.path)
    assert isinstance(judge, _Judged)
    assert saved is not None
    test = run.cloud.load_test_set(run.labels)
    place = [run.labels.index(name) for name in test.features["label"].names]
    ids, labels = _ids(run, list(test["text"])), [place[int(v)] for v in test["label"]]
    federated = judge.accuracy(saved[0], ids, labels)
    alone = [
        judge.accuracy(_federate(run, learner, [device]), ids, labels)
        for device in run.devices[:_ALONE]
    ]
    return {"federated": federated, "alone": float(np.mean(alone))}


def _federate(run: LocalRun, learner: Learner, devices: Sequence[Device]) -> State:
    settings = run.config.privacy.learning
    texts = [d.holdings.train for d in devices]
    parts: list[Part] = [(_ids(run, t.texts), t.labels) for t in texts]
    numbers = [run.devices.index(d) for d in devices]
    return federate_in_process(
        learner,
        parts,
        rounds=settings.rounds,
        seeds=[1000 * run.config.run.seed + n for n in numbers],
        clip=settings.clip,
        noise=settings.noise,
    )


def _ids(run: LocalRun, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    return tokenise(run.cloud.bottom.tokenizer, texts, run.config.model.max_length)
