"""How a bottleneck is learned: rounds of federated averaging with a local read-out.

A device tunes its blocks, the projection and a small read-out on its own labelled text; the cloud
averages. The token adversary, if there is one, belongs to the state: a device's own text is too
little to train a strong one afresh each round. What it tells about the text is told by the
update, and clipped and noised with the rest of it.

Legend: B sentences, T tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.assets import cache_root
from privtune_flwr.bundle import Manifest
from privtune_flwr.data import load_public_labelled, tokenise
from privtune_flwr.data.snippets import SNIPPET_CLASSES
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork
from privtune_flwr.privacy.bottleneck.recipe import NAME, TENSORS, Recipe
from privtune_flwr.privacy.learning import State, Update
from privtune_flwr.privacy.public import kept_tables

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
LAST_RATE = 0.3
WARM_EPOCHS = 2
WARM_CORPORA = ("amazon-snippets", "nyt-snippets")
_WARM_VERSION = 1  # raise it whenever the learning changes what a warm start comes to
_SECONDS = "seconds"
_WINDOW = 8
_TEST_BATCH = 32

Sequences = Sequence[NDArray[np.int32]]


class BottleneckLearner:
    """Learns a bottleneck; see :class:`privtune_flwr.privacy.learning.Learner`.

    Parameters
    ----------
    recipe : Recipe
        All settings.
    bottom : object
        The device's or the cloud's :class:`~privtune_flwr.models.bottom.BottomModel`.
    num_labels : int
        Classes of the task.
    """

    def __init__(self, recipe: Recipe, bottom: Any, num_labels: int) -> None:
        self.recipe = recipe
        self._bottom = bottom
        with _chance("start"):
            self._network = BottleneckNetwork(bottom, recipe.shape, num_labels)
        self._start = self._network.state()
        self.start_seconds = 0.0

    def start(self) -> State:
        """Give the state before the first round.

        Blocks as they are, all else at random; with a warm start, tuned on public labels, which is
        done once for all runs that start from there: it takes minutes.

        Raises
        ------
        MechanismError
            If a warm start is asked for and the task has not the public labels' two classes.
        """
        if self.recipe.warm_start == "none":
            return dict(self._start)
        if self._network.num_labels != len(SNIPPET_CLASSES):
            raise MechanismError(
                f"{NAME}.warm_start = 'labels': public labels are {', '.join(SNIPPET_CLASSES)}; "
                f"this task has {self._network.num_labels} classes"
            )
        public = load_public_labelled(WARM_CORPORA)
        sequences = tokenise(self._bottom.tokenizer, public.texts, self.recipe.positions)

        def learn() -> dict[str, NDArray[Any]]:
            begun = time.monotonic()
            self._network.put(self._start)
            with _chance("warm start"):
                self._fit(sequences, public.labels, WARM_EPOCHS, lambda done: 1 - 0.7 * done)
            return {**self._network.state(), _SECONDS: np.array([time.monotonic() - begun])}

        name = self._warm_name(sequences, public.labels)
        kept = dict(kept_tables(cache_root() / "warm-starts" / name, learn))
        self.start_seconds = float(kept.pop(_SECONDS)[0])
        return {key: np.array(value) for key, value in kept.items()}

    def update(
        self,
        state: State,
        sequences: Sequences,
        labels: Sequence[int],
        *,
        round_number: int,
        seed: int,
    ) -> Update:
        """Tune on a device's own text.

        Parameters
        ----------
        state : State
            As received.
        sequences : sequence of int32 arrays (T,)
            Token ids.
        labels : sequence of int
            A class each.
        round_number : int
            From 1; the learning rate falls linearly over all rounds.
        seed : int
            Of order and the channel's chance.

        Returns
        -------
        Update
            Change of every array; ``loss_sum`` and ``steps`` as metrics.

        Raises
        ------
        MechanismError
            If the state does not fit this network, or sentences and labels do not fit the task.
        """
        self._check(sequences, labels)
        self._network.put(state)
        rounds = self.recipe.rounds

        def rate(done: float) -> float:
            progress = min(1.0, max(0.0, (round_number - 1 + done) / rounds))
            return 1 - (1 - LAST_RATE) * progress

        loss_sum, steps = 0.0, 0
        if len(sequences):
            with _chance("update", seed, round_number):
                loss_sum, steps = self._fit(sequences, labels, self.recipe.epochs, rate)
        after = self._network.state()
        change = {name: after[name] - state[name] for name in after}
        metrics = {"loss_sum": loss_sum, "steps": float(steps)}
        return Update(change, len(sequences), metrics)

    def apply(self, state: State, mean_change: State) -> State:
        """Add the mean change."""
        return {n: (array + mean_change[n]).astype(np.float32) for n, array in state.items()}

    def finish(self, state: State, folder: Path) -> MechanismSpec:
        """Freeze blocks, projection and lift; read-out and adversary stay behind."""
        from safetensors.numpy import save_file

        self._network.put(state)
        kept = {
            name: np.ascontiguousarray(array)
            for name, array in state.items()
            if not name.startswith(("readout.", "adversary."))
        }
        save_file(kept, folder / TENSORS)
        params = self.recipe.params(rounds_done=self.recipe.rounds)
        return MechanismSpec(NAME, params, Manifest.of(folder).id)

    def accuracy(self, state: State, sequences: Sequences, labels: Sequence[int]) -> float:
        """Give the share of sentences that the local read-out classifies correctly.

        The reference *federated without a cloud*: what devices have when the rounds are over.
        """
        self._check(sequences, labels)
        self._network.put(state)
        right = 0
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        with _chance("accuracy"), torch.inference_mode():
            for start in range(0, len(order), _TEST_BATCH):
                chosen = order[start : start + _TEST_BATCH]
                ids_BT, mask_BT = padded([sequences[i] for i in chosen])
                guess_B = self._network.logits(ids_BT, mask_BT).argmax(1).tolist()
                right += sum(g == labels[i] for g, i in zip(guess_B, chosen, strict=True))
        return right / max(1, len(sequences))

    def _fit(
        self,
        sequences: Sequences,
        labels: Sequence[int],
        epochs: int,
        rate: Callable[[float], float],
    ) -> tuple[float, int]:
        """Train in place; ``rate`` gives the learning rate's factor from the share done."""
        network, recipe = self._network, self.recipe
        optimiser = _optimiser(network, recipe)
        base_rates = [group["lr"] for group in optimiser.param_groups]
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        lengths = [len(sequence) for sequence in sequences]
        plan = [b for _ in range(epochs) for b in shuffled_batches(lengths, recipe.batch_size, rng)]
        loss_sum = 0.0
        for step, chosen in enumerate(plan):
            factor = rate(step / len(plan))
            for group, base_rate in zip(optimiser.param_groups, base_rates, strict=True):
                group["lr"] = base_rate * factor
            ids_BT, mask_BT = padded([sequences[i] for i in chosen])
            labels_B = torch.tensor([int(labels[i]) for i in chosen])
            loss = network.loss(ids_BT, mask_BT, labels_B, recipe.adversary)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.learned().values(), CLIP_NORM)
            optimiser.step()
            loss_sum += loss.item() * len(chosen)
        return loss_sum / epochs, len(plan)

    def _warm_name(self, sequences: Sequences, labels: Sequence[int]) -> str:
        """Hash all that determines a warm start."""
        recipe = self.recipe
        digest = hashlib.sha256()
        parts = [_WARM_VERSION, WARM_EPOCHS, recipe.shape, recipe.batch_size, recipe.adversary]
        parts += [recipe.learning_rate, recipe.head_learning_rate, WEIGHT_DECAY, CLIP_NORM]
        digest.update(repr(parts).encode())
        for name, tensor in sorted(self._bottom.base.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for ids_T, label in zip(sequences, labels, strict=True):
            digest.update(ids_T.astype("<i4").tobytes() + int(label).to_bytes(4, "little"))
        return digest.hexdigest()[:32]

    def _check(self, sequences: Sequences, labels: Sequence[int]) -> None:
        classes = self._network.num_labels
        if len(sequences) != len(labels):
            raise MechanismError(
                f"{NAME}: {len(sequences)} sentences with {len(labels)} labels; one each is needed"
            )
        if len(labels) and not (min(labels) >= 0 and max(labels) < classes):
            raise MechanismError(f"{NAME}: a label lies outside the task's {classes} classes")
        if any(not 0 < len(s) <= self.recipe.positions for s in sequences):
            raise MechanismError(
                f"{NAME}: a sentence is empty or has more than {self.recipe.positions} tokens"
            )


def padded(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Pad sentences on the right; give ids and mask, both int64 (B, T)."""
    lengths = [len(sequence) for sequence in sequences]
    ids_BT = torch.zeros((len(sequences), max(lengths)), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : lengths[row]] = torch.from_numpy(sequence.astype(np.int64))
        mask_BT[row, : lengths[row]] = 1
    return ids_BT, mask_BT


def shuffled_batches(
    lengths: Sequence[int], batch_size: int, rng: np.random.Generator
) -> list[list[int]]:
    """Deal sentences into batches at random, those of like length together within a window."""
    order = rng.permutation(len(lengths)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), _WINDOW * batch_size):
        window = sorted(order[start : start + _WINDOW * batch_size], key=lambda i: lengths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _optimiser(network: BottleneckNetwork, recipe: Recipe) -> torch.optim.AdamW:
    blocks: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in network.learned().items():
        (blocks if name.startswith("base.") else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "lr": recipe.head_learning_rate}]
    if blocks:
        groups.append({"params": blocks, "lr": recipe.learning_rate})
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


@contextmanager
def _chance(*purpose: str | int) -> Iterator[None]:
    """Seed torch's generator for one purpose, and put it back afterwards."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        yield
