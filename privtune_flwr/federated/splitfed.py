"""SplitFed: a cut model of which both parts train; the top's half, and what both halves share.

Devices hold the bottom model, the cloud the top model. In every step the devices send the
representations of a batch each, the cloud trains the top model on the union of them, and each
device gets the gradient of its own rows back. After a round the bottom models are averaged
(SplitFed, Thapa et al., arXiv 2004.12088). With ``model.tuning = lora`` adapters train in both
halves, and only they are averaged (SplitLoRA, arXiv 2407.00952); with ``full``, all weights.

Legend: B sentences of a batch, N tokens of all of them, T tokens of the longest, D hidden size,
C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.codec import Lengths, Rows
from privtune_flwr.config import TrainConfig
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel
from privtune_flwr.models import (
    BottomModel,
    CutModel,
    ModelError,
    parameter_groups,
)
from privtune_flwr.models.families import last_parts, linear_names
from privtune_flwr.privacy.learning import State
from privtune_flwr.training.trainer import schedule_factor

_BOTTOM = "bottom."


def adapt_bottom(bottom: BottomModel, settings: FitSettings) -> Any:
    """Make a bottom model trainable, in place: adapters in its blocks, or all of it.

    Parameters
    ----------
    bottom : BottomModel
        Stays without dropout: what it gives is a function of its weights and the text.
    settings : FitSettings
        ``model.tuning`` and the adapters' settings.

    Returns
    -------
    PEFT's wrapper round the base model, for merging; None where there are no adapters.

    Raises
    ------
    ModelError
        If there is no block to adapt, or a target names no linear layer of one.
    """
    if settings.model.tuning != "lora":
        bottom.requires_grad_(True)
        return None
    from peft import LoraConfig, get_peft_model

    linear = linear_names(bottom.base, bottom.family)
    if not linear:
        raise ModelError("model.cut = 0: splitfed needs a block on the device that can be adapted")
    names = [part.strip() for part in settings.model.lora_targets.split(",") if part.strip()]
    if names == ["auto"]:
        names = list(bottom.family.lora_targets)
    targets = {path for path in linear for name in names if path.endswith(f".{name}")}
    if not targets:
        raise ModelError(
            f"model.lora-targets: no linear layer of the bottom model is called so; "
            f"allowed: auto, or any of {', '.join(last_parts(linear))}"
        )
    lora = LoraConfig(
        r=settings.model.lora_rank,
        lora_alpha=settings.model.lora_alpha,
        lora_dropout=0.0,
        target_modules=sorted(targets),
        fan_in_fan_out=bottom.family.conv1d,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return get_peft_model(bottom.base, lora)


class SplitFedModel(WholeModel):
    """Both halves in the cloud, for tests and the export; only the top half trains here.

    Parameters
    ----------
    parts : CutModel
        Cut at ``model.cut``; taken over, not copied.
    settings : FitSettings
        ``model.tuning`` says what of both halves is trained.
    """

    def __init__(self, parts: CutModel, settings: FitSettings) -> None:
        super().__init__(parts, settings)
        # in a tuple, so that its parameters are not counted as this module's a second time
        self._adapters = (adapt_bottom(parts.bottom, settings),)

    def bottom_state(self) -> State:
        """Copy what devices train, under the names that they know it by."""
        return {
            n.removeprefix(_BOTTOM): v for n, v in self.state().items() if n.startswith(_BOTTOM)
        }

    def load_bottom(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Put an averaged state of the bottom model in."""
        self.load(self.state() | {f"{_BOTTOM}{name}": value for name, value in state.items()})

    def merge(self) -> None:
        """Merge the bottom's adapters into its weights, for the export; training is over then."""
        for adapters in self._adapters:
            if adapters is not None:
                adapters.merge_and_unload()
        self._adapters = (None,)


@dataclass(frozen=True)
class DeviceBatch:
    """One device's share of a step: rows (N, D), tokens of each sentence, their classes."""

    rows_ND: Rows
    lengths_B: Lengths
    labels_B: NDArray[np.int32]


@dataclass(frozen=True)
class UnionStep:
    """What one step in the cloud came to.

    Attributes
    ----------
    loss_sum : float
        Cross-entropy summed over the union batch, before the step.
    correct, seen : int
        Right answers, and sentences.
    gradients : list of float32 arrays (N, D)
        For each device, of the mean loss over *its own* sentences: what it would have trained on
        with the top model at hand, whatever the others' batches are.
    """

    loss_sum: float
    correct: int
    seen: int
    gradients: list[Rows]


class UnionTrainer:
    """Trains the top model on the union of the devices' batches.

    Gradients are clipped by half (``train.clip-norm`` bounds the top's norm here and the bottom's
    on each device): no half knows the other's norm.

    Parameters
    ----------
    model : SplitFedModel
    train : TrainConfig
        The same settings as every method's.
    total_steps : int
        Of the whole run, for the schedule.
    """

    def __init__(self, model: SplitFedModel, train: TrainConfig, total_steps: int) -> None:
        self._top = model.top
        self._train = train
        self.total_steps = total_steps
        self.optimizer = make_optimizer(
            parameter_groups(
                model.top,
                lr=train.learning_rate,
                head_lr=train.head_learning_rate,
                weight_decay=train.weight_decay,
            ),
            train,
        )

    def step(self, batches: Sequence[DeviceBatch], number: int) -> UnionStep:
        """Take step ``number`` (from 0, over the run) on the mean loss of all sentences."""
        set_rate(self.optimizer, schedule_factor(number, self.total_steps, self._train))
        self._top.train()
        device = next(self._top.parameters()).device
        hidden_BTD, mask_BT = pad_rows(
            np.concatenate([b.rows_ND for b in batches]),
            np.concatenate([b.lengths_B for b in batches]),
        )
        labels_B = torch.from_numpy(np.concatenate([b.labels_B for b in batches]).astype(np.int64))
        hidden_BTD = hidden_BTD.to(device).requires_grad_(True)
        mask_BT, labels_B = mask_BT.to(device), labels_B.to(device)
        logits_BC = self._top(hidden_BTD, mask_BT)
        loss = nn.functional.cross_entropy(logits_BC, labels_B)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        clip(self.optimizer, self._train.clip_norm)
        self.optimizer.step()
        assert hidden_BTD.grad is not None
        gradient_ND = hidden_BTD.grad[mask_BT.bool()].float().cpu().numpy()
        return UnionStep(
            loss_sum=float(loss.detach()) * len(labels_B),
            correct=int((logits_BC.argmax(1) == labels_B).sum()),
            seen=len(labels_B),
            gradients=_own_means(gradient_ND, batches),
        )

    @torch.inference_mode()
    def logits(self, batch: DeviceBatch) -> Rows:
        """Classify received rows: float32 (B, C)."""
        self._top.eval()
        device = next(self._top.parameters()).device
        hidden_BTD, mask_BT = pad_rows(batch.rows_ND, batch.lengths_B)
        found: Rows = self._top(hidden_BTD.to(device), mask_BT.to(device)).float().cpu().numpy()
        return found


def _own_means(gradient_ND: Rows, batches: Sequence[DeviceBatch]) -> list[Rows]:
    """Cut the gradient of the union's mean loss into those of the devices' own mean losses."""
    seen = sum(len(b.labels_B) for b in batches)
    ends = np.cumsum([len(b.rows_ND) for b in batches])[:-1]
    return [
        part * np.float32(seen / len(batch.labels_B))
        for part, batch in zip(np.split(gradient_ND, ends), batches, strict=True)
    ]


def pad_rows(rows_ND: Rows, lengths_B: Lengths) -> tuple[Tensor, Tensor]:
    """Pad sentences on the right: float32 (B, T, D), and int64 (B, T), 1 at tokens."""
    lengths = lengths_B.astype(np.int64)
    mask_BT = torch.from_numpy(np.arange(int(lengths.max()))[None, :] < lengths[:, None])
    hidden_BTD = torch.zeros((*mask_BT.shape, rows_ND.shape[1]))
    hidden_BTD[mask_BT] = torch.from_numpy(np.ascontiguousarray(rows_ND, dtype=np.float32))
    return hidden_BTD, mask_BT.long()


# ------------------------------------------------------------------------------------ both halves


def device_batch_size(train: TrainConfig, devices: int) -> int:
    """Sentences of one device in a step: its share of the union batch, rounded up."""
    return math.ceil(train.batch_size / devices)


def make_optimizer(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimiser that the top model's trainer uses too."""
    if train.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    for group in optimizer.param_groups:
        group["base"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set learning rates to the schedule's share of their base."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def clip(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Bound the norm of all gradients that the optimiser sees."""
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], norm)


def save_moments(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, NDArray[np.float32]]:
    """Copy an optimiser's state: one float32 array for each kind and parameter."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, parameter in named.items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensor = torch.as_tensor(value, dtype=torch.float32)
                arrays[f"{kind}/{name}"] = tensor.detach().cpu().numpy().copy()
    return arrays


def load_moments(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    arrays: Mapping[str, NDArray[np.float32]],
) -> None:
    """Put back what :func:`save_moments` gave."""
    for key, value in arrays.items():
        kind, _, name = key.partition("/")
        parameter = named[name]
        # the count of steps stays on the CPU, where the optimiser keeps it
        place = "cpu" if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = torch.from_numpy(value.copy()).to(place)
