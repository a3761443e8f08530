"""What the top model can learn from public text before any private text: three losses.

Legend: N rows, B sentences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from privtune_flwr.models import BottomModel, TopModel
from privtune_flwr.models.heads import mean_pool
from privtune_flwr.training.batches import collate
from privtune_flwr.training.store import Example

if TYPE_CHECKING:
    from privtune_flwr.privacy.public import PublicKnowledge

_TEACHER_BATCH = 64
_PSEUDO_COUNT = 0.1


class Objective(ABC):
    """A loss of a top model on released public rows."""

    def __init__(self, top: TopModel) -> None:
        self.top = top

    @property
    def device(self) -> torch.device:
        """Where the top model is."""
        return next(self.top.parameters()).device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give parameters of the objective's own, to be trained along and thrown away."""
        return iter(())

    @abstractmethod
    def loss(self, hidden_BTD: Tensor, mask_BT: Tensor, batch: Sequence[Example]) -> Tensor:
        """Give the mean loss of a padded batch of released rows."""


class Labels(Objective):
    """Cross-entropy of the examples' labels."""

    def loss(self, hidden_BTD: Tensor, mask_BT: Tensor, batch: Sequence[Example]) -> Tensor:
        """Cross-entropy, nats a sentence."""
        labels_B = torch.tensor([e.label for e in batch], device=self.device)
        return functional.cross_entropy(self.top(hidden_BTD, mask_BT), labels_B)


class Distil(Objective):
    """Give the last hidden states that the untouched model has on clean rows.

    The squared error of tokens and that of sentence means, each relative to the targets' variance,
    are added: 2 is no better than always giving the mean. Tokens teach the blocks to denoise, the
    mean is what a pooling head will read, and most of the noise is averaged away in it.

    Parameters
    ----------
    top : TopModel
        In the state whose answers on clean rows are the targets; they are computed here, once.
    bottom : BottomModel
        Gives clean rows.
    sequences : list of int arrays (T,)
        The sentences.
    examples : sequence of Example
        Their places among the released rows; the targets lie at the same ones.
    folder : Path
        Receives the targets.
    """

    def __init__(
        self,
        top: TopModel,
        bottom: BottomModel,
        sequences: Sequence[NDArray[np.int32]],
        examples: Sequence[Example],
        folder: Path,
    ) -> None:
        super().__init__(top)
        total = sum(e.length for e in examples)
        shape = (total, bottom.hidden_size)
        self._targets_ND = np.memmap(
            folder / "targets.bin", dtype=np.float32, mode="w+", shape=shape
        )
        self._teach(bottom, sequences, examples)
        means_BD = np.stack(
            [self._targets_ND[e.offset : e.offset + e.length].mean(axis=0) for e in examples]
        )
        self._token_variance = max(float(self._targets_ND.var(axis=0).sum()), 1e-12)
        self._mean_variance = max(float(means_BD.var(axis=0).sum()), 1e-12)

    @torch.no_grad()
    def _teach(
        self,
        bottom: BottomModel,
        sequences: Sequence[NDArray[np.int32]],
        examples: Sequence[Example],
    ) -> None:
        base = self.top.network.base_model  # past the lift: clean rows have the model's size
        self.top.eval()
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), _TEACHER_BATCH):
            part = order[start : start + _TEACHER_BATCH]
            clean = bottom.encode([sequences[i] for i in part])
            padded_BTD = nn.utils.rnn.pad_sequence(
                [torch.from_numpy(rows) for rows in clean], batch_first=True
            ).to(self.device)
            lengths_B = torch.tensor([len(rows) for rows in clean], device=self.device)
            number_T = torch.arange(padded_BTD.shape[1], device=self.device)
            mask_BT = (number_T < lengths_B[:, None]).long()
            states_BTD = base(inputs_embeds=padded_BTD, attention_mask=mask_BT).last_hidden_state
            for row, i in enumerate(part):
                example = examples[i]
                self._targets_ND[example.offset : example.offset + example.length] = (
                    states_BTD[row, : example.length].float().cpu().numpy()
                )

    def loss(self, hidden_BTD: Tensor, mask_BT: Tensor, batch: Sequence[Example]) -> Tensor:
        """Relative squared error of tokens plus that of sentence means."""
        targets_BTD = collate(self._targets_ND, batch)[0].to(self.device)
        states_BTD = self.top.last_hidden(hidden_BTD, mask_BT).float()
        error_BTD = (states_BTD - targets_BTD) * mask_BT.unsqueeze(-1)
        tokens = error_BTD.square().sum() / mask_BT.sum()
        means = mean_pool(error_BTD, mask_BT).square().sum(1).mean()
        return tokens / self._token_variance + means / self._mean_variance


class Reconstruct(Objective):
    """Tell the true tokens from the last hidden states, with a temporary head.

    The head is a square map into the space of the bank, whose centred, normalised entries weigh the
    vocabulary; a head of V free rows would not be learned from a few thousand sentences. Special
    tokens are left out.

    Parameters
    ----------
    top : TopModel
    public : PublicKnowledge
        Bank and counts.
    sequences : sequence of int arrays (T,)
        The sentences, in the order of their rows.
    """

    def __init__(
        self, top: TopModel, public: PublicKnowledge, sequences: Sequence[NDArray[np.int32]]
    ) -> None:
        super().__init__(top)
        bank_VD = np.asarray(public.bank, dtype=np.float32)
        entries_VD = torch.from_numpy(bank_VD - bank_VD.mean(axis=0))
        self._entries_VD = functional.normalize(entries_VD, dim=1).to(self.device)
        prior_V = public.counts + _PSEUDO_COUNT
        log_prior_V = np.log(prior_V / prior_V.sum()).astype(np.float32)
        self._log_prior_V = torch.from_numpy(log_prior_V).to(self.device)
        self._ids_N = np.concatenate(sequences)
        self._special = torch.from_numpy(public.special_ids).to(self.device)
        hidden = bank_VD.shape[1]
        self._map_DD = nn.Parameter(torch.eye(hidden, device=self.device))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the head's map."""
        return iter((self._map_DD,))

    def loss(self, hidden_BTD: Tensor, mask_BT: Tensor, batch: Sequence[Example]) -> Tensor:
        """Cross-entropy of the true tokens, nats a token."""
        ids_M = torch.from_numpy(self._true_ids(batch)).to(self.device)
        states_MD = self.top.last_hidden(hidden_BTD, mask_BT).float()[mask_BT.bool()]
        text_M = ~torch.isin(ids_M, self._special)
        states_MD = functional.layer_norm(states_MD[text_M], states_MD.shape[1:])
        scores_MV = states_MD @ self._map_DD @ self._entries_VD.T + self._log_prior_V
        return functional.cross_entropy(scores_MV, ids_M[text_M])

    def _true_ids(self, batch: Sequence[Example]) -> NDArray[Any]:
        parts = [self._ids_N[e.offset : e.offset + e.length] for e in batch]
        return np.concatenate(parts).astype(np.int64)
