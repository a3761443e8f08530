"""What a learning phase leaves in the run folder: the state of each round, then what was frozen.

``learned/state.safetensors`` holds the state after the last finished round and, in its metadata,
how it came about: one file, so that a kill leaves the old or the new one whole.
``learned/artefact/`` and ``learned/spec.json`` are the mechanism that devices release with.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from privtune_flwr.bundle import Manifest
from privtune_flwr.errors import RunError
from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.privacy.learning import Learner, State
from privtune_flwr.results.run_folder import write_text

if TYPE_CHECKING:
    from privtune_flwr.cloud import CloudSide

FOLDER = "learned"
_STATE = "state.safetensors"
_SPEC = "spec.json"
_ARTEFACT = "artefact"


@dataclass
class LearningProgress:
    """Where a learning phase stands after a finished round.

    Attributes
    ----------
    draft : str
        Id of the specification that is learned.
    round : int
        Last finished round; 0 = none.
    rounds : list of dict
        One record a round, as in ``rounds.jsonl``.
    dropped : dict
        Device to the reason for which it left the run in this phase.
    traffic : dict
        Device to ``{"up", "down", "messages"}`` so far.
    seconds : float
        Wall time so far.
    start_seconds : float
        What the cloud took to learn the state before the first round, in this run or before it.
    """

    draft: str
    round: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    traffic: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: float = 0.0
    start_seconds: float = 0.0


def save_state(run_folder: Path, state: State, progress: LearningProgress) -> None:
    """Keep a round's state; a kill at any moment leaves the old or the new one whole."""
    from safetensors.numpy import save

    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    temporary = folder / f".{_STATE}.tmp"
    with temporary.open("wb") as file:
        file.write(save(arrays, metadata={"progress": json.dumps(asdict(progress))}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _STATE)


def load_state(run_folder: Path) -> tuple[State, LearningProgress] | None:
    """Read what :func:`save_state` kept; None where there is nothing yet."""
    from safetensors import safe_open

    path = run_folder / FOLDER / _STATE
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        progress = LearningProgress(**json.loads(file.metadata()["progress"]))
    return state, progress


def freeze(run_folder: Path, learner: Learner, state: State) -> None:
    """Write the learned mechanism into the run folder; the specification last.

    Raises
    ------
    RunError
        If the specification does not name the files that were written.
    """
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".artefact-"))
    try:
        spec = learner.finish(state, staging)
        _check_files(spec, staging)
        shutil.rmtree(folder / _ARTEFACT, ignore_errors=True)
        staging.rename(folder / _ARTEFACT)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    write_text(folder / _SPEC, spec.to_json())


def adopt_learned(cloud: CloudSide, run_folder: Path) -> bool:
    """Give a cloud side the mechanism that its run has learned, if the run is past its learning.

    Returns
    -------
    bool
        Whether there was one.

    Raises
    ------
    RunError
        If the files are not what the specification names.
    """
    folder = run_folder / FOLDER
    if not cloud.mechanism.learned or not (folder / _SPEC).exists():
        return False
    spec = MechanismSpec.from_json((folder / _SPEC).read_text(encoding="utf-8"))
    _check_files(spec, folder / _ARTEFACT)
    cloud.adopt(spec, folder / _ARTEFACT if spec.artefact else None)
    return True


def _check_files(spec: MechanismSpec, folder: Path) -> None:
    manifest = Manifest.of(folder)
    if spec.artefact != (manifest.id if manifest.files else ""):
        raise RunError(f"learned mechanism {spec.name}: its files are not those it names")
