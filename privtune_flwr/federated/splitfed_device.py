"""SplitFed: the device's half, and what it keeps on its disk between two messages.

A device is asked once a step and remembers nothing in memory, so after every message the bottom
model's state, the optimiser's moments and the position lie in a file. The forward pass of a batch
is computed twice, when its representations leave and when their gradient comes back: there is no
dropout and the state is the same, so the result is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor, nn

from privtune_flwr.codec import Rows
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.splitfed import (
    adapt_bottom,
    clip,
    load_moments,
    make_optimizer,
    save_moments,
    set_rate,
)
from privtune_flwr.federated.whole import pad
from privtune_flwr.models import BottomModel
from privtune_flwr.privacy.learning import State
from privtune_flwr.training.batches import batch_order
from privtune_flwr.training.trainer import schedule_factor

_NOW = "splitfed-now.safetensors"
_END = "splitfed-end-"


class BottomTwin:
    """A provisioned bottom model that trains: the twin of the frozen one.

    Parameters
    ----------
    bottom : BottomModel
        Taken over, not copied.
    settings : FitSettings
        The run's.
    """

    def __init__(self, bottom: BottomModel, settings: FitSettings) -> None:
        self.bottom = bottom
        self.settings = settings
        adapt_bottom(bottom, settings)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name what is trained, in order of name."""
        return {n: p for n, p in sorted(self.bottom.named_parameters()) if p.requires_grad}

    def state(self) -> State:
        """Copy what is trained."""
        return {n: p.detach().numpy().astype(np.float32) for n, p in self.trainable().items()}

    def load(self, state: State) -> None:
        """Put a state in.

        Raises
        ------
        Refusal
            If its names or shapes are not those of this model's.
        """
        own = self.trainable()
        if set(own) != set(state) or any(tuple(own[n].shape) != state[n].shape for n in own):
            raise Refusal("request.state: its arrays are not those that this bottom model trains")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))

    def optimizer(self) -> torch.optim.Optimizer:
        """Build the optimiser, with the settings of the blocks in the cloud."""
        train = self.settings.train
        groups = []
        for decay, wanted in ((train.weight_decay, True), (0.0, False)):
            chosen = [p for p in self.trainable().values() if (p.ndim > 1) == wanted]
            if chosen:
                groups.append({"params": chosen, "lr": train.learning_rate, "weight_decay": decay})
        return make_optimizer(groups, train)

    def forward(self, sequences: Sequence[NDArray[np.int32]]) -> Tensor:
        """Compute rows (N, D) of a batch, sentence after sentence without padding."""
        ids_BT, mask_BT = pad(sequences)
        hidden_BTD: Tensor = self.bottom(ids_BT, mask_BT)
        return hidden_BTD[mask_BT.bool()]

    @torch.no_grad()
    def rows(self, sequences: Sequence[NDArray[np.int32]]) -> Rows:
        """Compute what leaves for a batch, float32 (N, D)."""
        return self.forward(sequences).float().numpy()

    def step(
        self,
        sequences: Sequence[NDArray[np.int32]],
        gradient_ND: Rows,
        optimizer: torch.optim.Optimizer,
        factor: float,
    ) -> None:
        """Train on the gradient that came down for a batch's rows."""
        set_rate(optimizer, factor)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.forward(sequences), torch.from_numpy(gradient_ND))
        clip(optimizer, self.settings.train.clip_norm)
        optimizer.step()


@lru_cache(maxsize=1)
def held_twin(folder: Path, settings: FitSettings) -> BottomTwin:
    """Load a device's bottom model once a process; the caller puts a state into it.

    A cache only: the folder is named by the hash of its content.
    """
    return BottomTwin(BottomModel.load(folder), settings)


def round_batches(lengths: Sequence[int], size: int, passes: int, seed: int) -> list[list[int]]:
    """Draw a device's batches of one round: ``passes`` times over its sentences."""
    return [b for n in range(passes) for b in batch_order(lengths, size, [seed, n])]


def batch_count(examples: int, size: int, passes: int) -> int:
    """Count them: what the cloud knows of them."""
    return passes * -(-examples // size)


@dataclass(frozen=True)
class Position:
    """Where a device stands.

    Attributes
    ----------
    run : str
        Names run and settings.
    round, step : int
        The last message that was answered.
    identity : str
        Hash of that message: the same again is a retry.
    starts : int
        How often this round was begun: more than once if the cloud was restarted.
    """

    run: str
    round: int
    step: int
    identity: str
    starts: int = 1


class Journal:
    """State of the bottom model, moments and position, on the device's disk.

    There are two files: the state after the last message, and the moments at the end of the round
    before, from which a round starts again when the cloud is resumed.

    Parameters
    ----------
    root : Path
        The device's home.
    run : str
        Names run and settings; what another run left is not used.
    """

    def __init__(self, root: Path, run: str) -> None:
        self._root = root
        self._run = run

    def now(self) -> tuple[Position, State, State] | None:
        """Give position, state and moments after the last message of this run."""
        return self._read(self._root / _NOW)

    def moments_before(self, round_number: int) -> State:
        """Give the moments that a round starts from: of the last round that this device ended."""
        ends = [self._read(path) for path in self._root.glob(f"{_END}*")]
        earlier = [end for end in ends if end is not None and end[0].round < round_number]
        return max(earlier, key=lambda end: end[0].round)[2] if earlier else {}

    def write(self, position: Position, state: State, moments: State) -> None:
        """Keep what a message came to."""
        self._write(self._root / _NOW, position, state, moments)

    def close_round(self, position: Position, moments: State) -> None:
        """Keep the moments at the end of a round, and those of the round before; no others."""
        self._write(self._root / f"{_END}{position.round}.safetensors", position, {}, moments)
        for path in self._root.glob(f"{_END}*"):
            end = self._read(path)
            if end is None or not position.round - 1 <= end[0].round <= position.round:
                path.unlink()

    def _read(self, path: Path) -> tuple[Position, State, State] | None:
        if not path.exists():
            return None
        with safe_open(path, framework="numpy") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            if position.run != self._run:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts: dict[str, State] = {"state": {}, "moment": {}}
        for name, value in arrays.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value
        return position, parts["state"], parts["moment"]

    def _write(self, path: Path, position: Position, state: State, moments: State) -> None:
        arrays = {f"state/{n}": v for n, v in state.items()}
        arrays |= {f"moment/{n}": v for n, v in moments.items()}
        handle, temporary = tempfile.mkstemp(dir=self._root, prefix=".splitfed-")
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays, metadata={"position": json.dumps(asdict(position))}))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)


def schedule_step(round_number: int, step: int, steps: int) -> int:
    """Count, from 0 and over the run, the step in which batch ``step`` of a round is trained."""
    return (round_number - 1) * steps + step - 1


def train_message(
    twin: BottomTwin,
    journal: Journal,
    position: Position,
    batches: Sequence[Sequence[NDArray[np.int32]]],
    gradient_ND: Rows,
    *,
    steps: int,
    rounds: int,
) -> None:
    """Take the step of batch ``position.step - 1``, unless this message has been answered before.

    Afterwards the twin holds the state that the answer is made from.

    Parameters
    ----------
    position : Position
        Where the message leads: its round, step and identity.
    batches : sequence
        The round's, in order.
    gradient_ND : float32 array (N, D)
        Of the batch whose rows left in the message before.
    steps, rounds : int
        Steps of a round, over all devices, and rounds of the run: for the schedule.

    Raises
    ------
    Refusal
        If the device does not stand one message before: a step is taken once, in order.
    """
    found = journal.now()
    at = (found[0].round, found[0].step) if found else (0, 0)
    if found and at == (position.round, position.step) and found[0].identity == position.identity:
        twin.load(found[1])
        return
    if found is None or at != (position.round, position.step - 1):
        raise Refusal(
            f"request.step = {position.step} of round {position.round}: "
            f"this device has answered step {at[1]} of round {at[0]}"
        )
    twin.load(found[1])
    optimizer = twin.optimizer()
    load_moments(optimizer, twin.trainable(), found[2])
    done = position.step - 1
    number = schedule_step(position.round, done, steps)
    factor = schedule_factor(number, steps * rounds, twin.settings.train)
    twin.step(batches[done - 1], gradient_ND, optimizer, factor)
    moments = save_moments(optimizer, twin.trainable())
    position = Position(**{**asdict(position), "starts": found[0].starts})
    # the end of a round first: once the position is written, this message is not worked on again
    if position.step == len(batches) + 1:
        journal.close_round(position, moments)
    journal.write(position, twin.state(), moments)


def begin_round(
    twin: BottomTwin, journal: Journal, position: Position, state: State
) -> tuple[Position, bool]:
    """Start a round from the averaged state that came.

    Returns
    -------
    position : Position
        With the count of starts.
    again : bool
        Whether this is a retry of the message that was answered last: nothing new leaves.
    """
    twin.load(state)
    found = journal.now()
    if found and found[0].round == position.round:
        if found[0].step == 1 and found[0].identity == position.identity:
            return found[0], True
        position = Position(**{**asdict(position), "starts": found[0].starts + 1})
    return position, False
