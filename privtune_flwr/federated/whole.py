"""A model that one machine holds whole, and the part of it that a method trains.

Legend: B sentences in a batch, T tokens, P prompt tokens, D hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.models import CutModel, apply_lora, cut_model, parameter_groups
from privtune_flwr.models.bottom import length_sorted_batches
from privtune_flwr.privacy.learning import State

_EVAL_TOKENS = 4096
_PROMPT_STD = 0.02


class WholeModel(nn.Module):
    """Embeddings, blocks and head on one machine: a model cut at 0, with both parts here.

    Parameters
    ----------
    parts : CutModel
        Cut at 0; taken over, not copied.
    settings : FitSettings
        ``model.tuning`` says what is trainable: ``full``, all of it; ``lora``, adapters in the
        blocks and the head; ``prompt``, ``federated.prompt-tokens`` vectors and the head.

    Notes
    -----
    Prompts averaged over devices are FedPrompt's idea (Zhao et al., arXiv 2208.12268). Here the
    vectors stand above the embeddings, among a text's hidden states, and not among its words'
    embeddings; a fresh head is trained and averaged with them, where FedPrompt (*reconstruction*)
    lets the pretrained model name the class. The prompt has a rate of its own,
    ``federated.prompt-learning-rate``, and no weight decay.
    """

    def __init__(self, parts: CutModel, settings: FitSettings) -> None:
        super().__init__()
        self.parts = parts
        self.settings = settings
        self.bottom = parts.bottom
        self.top = parts.top
        self.prompt_PD: nn.Parameter | None = None
        tuning = settings.model.tuning
        if tuning == "lora":
            apply_lora(self.top, settings.model)
        elif tuning == "full":
            self.bottom.requires_grad_(True)
        else:
            fresh = {
                id(p)
                for name in self.top.fresh_modules
                for p in self.top.network.get_submodule(name).parameters()
            }
            for parameter in self.top.parameters():
                parameter.requires_grad_(id(parameter) in fresh)
            draw = torch.Generator().manual_seed(settings.seed)
            shape = (settings.federated.prompt_tokens, parts.spec.hidden_size)
            self.prompt_PD = nn.Parameter(_PROMPT_STD * torch.randn(shape, generator=draw))

    @property
    def prompt_place(self) -> int:
        """Row of the top model's input at which a soft prompt begins."""
        return 1 if self.top.family.kind == "encoder" else 0

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Classify a right-padded batch: token ids (B, T) and mask (B, T) to logits_BC.

        A soft prompt stands behind the first token of an encoder, whose state the head may read,
        and before that of a decoder. It is added above the embeddings: it has no position there
        (a decoder with rotary positions counts it, and shifts the text by P).
        With the ``mean`` head the prompt's own states are not averaged: they would weigh more the
        shorter a text is, up to half of a short one, and say the same of every text.
        """
        hidden_BTD = self.bottom(ids_BT, mask_BT)
        logits_BC: Tensor
        if self.prompt_PD is None:
            logits_BC = self.top(hidden_BTD, mask_BT)
            return logits_BC
        logits_BC = self.top(*self.with_prompt(hidden_BTD, mask_BT))
        return logits_BC

    def with_prompt(self, hidden_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put the prompt in its place: P positions more.

        Returns
        -------
        hidden, mask : Tensor
            (B, P + T, D) and (B, P + T): what attention reads.
        text : Tensor
            (B, P + T): one for the text's own tokens.
        """
        assert self.prompt_PD is not None
        place = self.prompt_place
        prompt_BPD = self.prompt_PD.expand(len(hidden_BTD), -1, -1)
        ones_BP = mask_BT.new_ones(prompt_BPD.shape[:2])
        before_BT, after_BT = mask_BT[:, :place], mask_BT[:, place:]
        hidden_BTD = torch.cat([hidden_BTD[:, :place], prompt_BPD, hidden_BTD[:, place:]], dim=1)
        return (
            hidden_BTD,
            torch.cat([before_BT, ones_BP, after_BT], dim=1),
            torch.cat([before_BT, 0 * ones_BP, after_BT], dim=1),
        )

    def beside(self) -> State:
        """Give what an ordinary checkpoint of this model cannot hold: its prompt, if it has one."""
        if self.prompt_PD is None:
            return {}
        return {"prompt": self.prompt_PD.detach().cpu().numpy().copy()}

    def groups(self) -> list[dict[str, Any]]:
        """Group what is trained for an optimiser: base rates, decay for matrices."""
        train = self.settings.train
        groups = parameter_groups(
            self.top,
            lr=train.learning_rate,
            head_lr=train.head_learning_rate,
            weight_decay=train.weight_decay,
        )
        rest = [p for p in self.bottom.parameters() if p.requires_grad]
        for name, chosen, decay in (
            ("embeddings-decay", [p for p in rest if p.ndim > 1], train.weight_decay),
            ("embeddings-no-decay", [p for p in rest if p.ndim == 1], 0.0),
        ):
            if chosen:
                groups.append(
                    {
                        "name": name,
                        "params": chosen,
                        "lr": train.learning_rate,
                        "weight_decay": decay,
                    }
                )
        if self.prompt_PD is not None:
            groups.append(
                {
                    "name": "prompt",
                    "params": [self.prompt_PD],
                    "lr": self.settings.federated.prompt_learning_rate,
                    "weight_decay": 0.0,
                }
            )
        return groups

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name what is trained, in order of name."""
        return {n: p for n, p in sorted(self.named_parameters()) if p.requires_grad}

    def state(self) -> State:
        """Copy what is trained: float32 arrays by name."""
        return {
            n: p.detach().cpu().numpy().astype(np.float32, copy=True)
            for n, p in self.trainable().items()
        }

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Put a state back.

        Raises
        ------
        ValueError
            If its names or shapes are not those of :meth:`trainable`; nothing is changed then.
        """
        own = self.trainable()
        if set(own) != set(state) or any(tuple(own[n].shape) != state[n].shape for n in own):
            raise ValueError("state: its arrays are not those that this model trains")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))

    @torch.inference_mode()
    def logits(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Classify sentences of any lengths: token ids (T,) each to float32 (B, C)."""
        self.eval()
        device = next(self.parameters()).device
        found = np.zeros((len(sequences), self.parts.spec.num_labels), dtype=np.float32)
        for batch in length_sorted_batches([len(s) for s in sequences], _EVAL_TOKENS):
            ids_BT, mask_BT = pad([sequences[i] for i in batch])
            found[batch] = self(ids_BT.to(device), mask_BT.to(device)).float().cpu().numpy()
        return found


def pad(sequences: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Pad token ids on the right: ids_BT and mask_BT, int64."""
    longest = max(len(s) for s in sequences)
    ids_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
        mask_BT[row, : len(sequence)] = 1
    return ids_BT, mask_BT


def load_whole(source: Path | str, settings: FitSettings, labels: Sequence[str]) -> WholeModel:
    """Load a whole model for a task; its fresh parts are drawn from the settings' seed.

    Parameters
    ----------
    source : Path | str
        As :func:`privtune_flwr.models.cut_model` takes it; on a device, the provisioned bundle.
    settings : FitSettings
    labels : sequence of str
        Names of the classes, in order.

    Raises
    ------
    ModelError
        If it holds no model of a supported family.
    """
    parts = cut_model(
        source,
        cut=0,
        num_labels=len(labels),
        head=settings.model.head,
        seed=settings.seed,
        labels=labels,
    )
    if settings.train.strategy == "bbt":
        from privtune_flwr.federated.blackbox import BlackBoxModel

        return BlackBoxModel(parts, settings)
    return WholeModel(parts, settings)


@lru_cache(maxsize=1)
def held_whole(folder: Path, settings: FitSettings, labels: tuple[str, ...]) -> WholeModel:
    """Load a device's whole model once a process; the caller puts a state into it.

    A cache only: the folder is named by the hash of its content.
    """
    return load_whole(folder, settings, labels)
