"""The network that reads narrow rows by their sentence, from scratch.

Each row's numbers, its levels where it has any, its place from either end of the sentence and, for
rows that are no symbols, what the Gaussian makes of it go through a convolution over neighbours and
a small transformer. The score of token v is

    z . b_v + q . f_v + c_v + log pi_v,

with b_v the principal components of the bank, so that a word seen rarely or never is read like
those that mean the same; f_v and c_v free for the commonest tokens alone; pi_v the prior. All but
the prior starts at zero: untrained, the network guesses by frequency.

Shapes: ``B`` sentences, ``T`` tokens, ``N`` rows, ``r`` width of a row, ``L`` levels of one number,
``V`` vocabulary, ``H`` commonest tokens (head), ``C`` candidates, ``W`` width, ``K`` components,
``F`` free numbers of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from privtune_flwr.audit.attacks.levels import Levels

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge

_WIDTH, _HEADS, _LAYERS = 256, 4, 2
_KERNEL = 5  # rows that a convolution sees together
_DROPOUT = 0.1
_BLANKED = 0.1  # of rows while it learns: then neighbours must do
_HEAD, _TAIL = 2000, 256  # commonest tokens; others sampled a batch
_COMPONENTS, _FREE = 128, 64
_PLACES = 48  # told apart from either end
_MOST_SYMBOLS = 4096  # whole rows that get an entry of their own
_FAR = 5.0  # standard deviations; numbers beyond are cut


class Reader(nn.Module):
    """Scores of all tokens from the rows of whole sentences.

    Parameters
    ----------
    knowledge : Knowledge
        Gives bank, prior and the Gaussian.
    rows_NR : float array, shape (N, r)
        Own releases: their spread.
    levels : Levels or None
        Theirs, if they are symbols.
    """

    def __init__(
        self, knowledge: Knowledge, rows_NR: NDArray[np.float32], levels: Levels | None
    ) -> None:
        super().__init__()
        self.levels = levels
        self.mean_R = torch.tensor(rows_NR.mean(axis=0))
        self.scale_R = torch.tensor(rows_NR.std(axis=0)) + 1e-6
        prior_V = knowledge.prior
        self.log_prior_V = torch.tensor(np.log(prior_V), dtype=torch.float32)
        self.head_H = torch.tensor(np.argsort(-prior_V, kind="stable")[:_HEAD].copy())
        self.place_V = torch.full((len(prior_V),), -1)
        self.place_V[self.head_H] = torch.arange(len(self.head_H))
        self.bank_VK = _components(knowledge)
        self.gaussian = None if levels is not None else knowledge.posterior()
        self.rows_in = nn.Linear(rows_NR.shape[1], _WIDTH)
        self.levels_in, self.symbols_in = self._tables()
        self.denoised_HW = nn.Parameter(torch.randn(len(self.head_H), _WIDTH) / 16)
        self.start_in = nn.Embedding(_PLACES, _WIDTH)
        self.end_in = nn.Embedding(_PLACES, _WIDTH)
        self.first = nn.LayerNorm(_WIDTH)
        self.near = nn.Conv1d(_WIDTH, _WIDTH, _KERNEL, padding=_KERNEL // 2)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 2 * _WIDTH, _DROPOUT, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.last = nn.LayerNorm(_WIDTH)
        self.to_bank = nn.Linear(_WIDTH, self.bank_VK.shape[1], bias=False)
        nn.init.zeros_(self.to_bank.weight)
        self.to_free = nn.Linear(_WIDTH, _FREE)
        self.free_HF = nn.Parameter(torch.zeros(len(self.head_H), _FREE))
        self.bias_H = nn.Parameter(torch.zeros(len(self.head_H)))

    def forward(self, rows: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        """Give a vector for each row of whole sentences, (N, W)."""
        stacked_NR = np.concatenate(rows)
        into_NW = self._entered(stacked_NR)
        if self.training:
            into_NW = into_NW * (torch.rand(len(into_NW), 1) >= _BLANKED)
        lengths = [len(r) for r in rows]
        start_N = torch.cat([torch.arange(n) for n in lengths]).clamp(max=_PLACES - 1)
        end_N = torch.cat([torch.arange(n).flip(0) for n in lengths]).clamp(max=_PLACES - 1)
        into_NW = self.first(into_NW + self.start_in(start_N) + self.end_in(end_N))
        real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        into_BTW = into_NW.new_zeros(*real_BT.shape, _WIDTH)
        into_BTW[real_BT] = into_NW
        near_BTW = functional.gelu(self.near(into_BTW.transpose(1, 2)).transpose(1, 2))
        read_BTW = self.blocks(into_BTW + near_BTW, src_key_padding_mask=~real_BT)
        out_NW: torch.Tensor = self.last(read_BTW[real_BT])
        return out_NW

    def sampled_loss(
        self, rows: Sequence[NDArray[np.float32]], ids_N: torch.Tensor
    ) -> torch.Tensor:
        """Estimate the cross entropy from head, own tokens and a sample that stands for the rest.

        Parameters
        ----------
        rows : sequence of float32 arrays (T, r)
            Of whole sentences.
        ids_N : int64 tensor
            Their tokens.
        """
        chosen_V = torch.zeros(len(self.log_prior_V), dtype=torch.bool)
        chosen_V[self.head_H] = chosen_V[ids_N] = True
        others = (~chosen_V).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others))[:_TAIL]]
        own = chosen_V.index_fill(0, self.head_H, value=False).nonzero()[:, 0]
        candidates_C = torch.cat([self.head_H, own, drawn])
        place_V = torch.empty(len(chosen_V), dtype=torch.long)
        place_V[candidates_C] = torch.arange(len(candidates_C))
        weight_C = torch.zeros(len(candidates_C))
        if len(drawn):
            weight_C[-len(drawn) :] = math.log(len(others) / len(drawn))
        scores_NC = self._scored(self(rows), candidates_C) + weight_C
        return functional.cross_entropy(scores_NC, place_V[ids_N])

    @torch.inference_mode()
    def log_posterior(self, rows: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        """Give log p(v | the sentence's rows) of whole sentences, (N, V)."""
        everything = torch.arange(len(self.log_prior_V))
        order = torch.cat([self.head_H, everything[self.place_V < 0]])
        scores_NC = self._scored(self(rows), order)
        scores_NV = torch.empty_like(scores_NC)
        scores_NV[:, order] = scores_NC
        return scores_NV.log_softmax(dim=1)

    def _tables(self) -> tuple[nn.ModuleList, nn.Embedding | None]:
        if self.levels is None:
            return nn.ModuleList(), None
        each = nn.ModuleList(nn.Embedding(size, _WIDTH) for size in self.levels.sizes)
        few = self.levels.symbols <= _MOST_SYMBOLS
        return each, nn.Embedding(self.levels.symbols, _WIDTH) if few else None

    def _entered(self, rows_NR: NDArray[np.float32]) -> torch.Tensor:
        """Embed rows one by one, (N, W)."""
        standard_NR = (torch.tensor(rows_NR) - self.mean_R) / self.scale_R
        into_NW: torch.Tensor = self.rows_in(standard_NR.clamp(-_FAR, _FAR))
        if self.gaussian is not None:
            with torch.no_grad():
                read_NH = self.gaussian.log_posterior_of(rows_NR, self.head_H).exp()
            into_NW = into_NW + read_NH @ self.denoised_HW
        if self.levels is not None:
            places_NR = torch.from_numpy(self.levels.places(rows_NR))
            symbol_N = torch.zeros(len(places_NR), dtype=torch.long)
            for number, (size, table) in enumerate(
                zip(self.levels.sizes, self.levels_in, strict=True)
            ):
                into_NW = into_NW + table(places_NR[:, number])
                symbol_N = symbol_N * size + places_NR[:, number]
            if self.symbols_in is not None:
                into_NW = into_NW + self.symbols_in(symbol_N)
        return into_NW

    def _scored(self, out_NW: torch.Tensor, candidates_C: torch.Tensor) -> torch.Tensor:
        """Score candidates, the head first, (N, C)."""
        scores_NC = torch.addmm(
            self.log_prior_V[candidates_C], self.to_bank(out_NW), self.bank_VK[candidates_C].T
        )
        head_NH = torch.addmm(self.bias_H, self.to_free(out_NW), self.free_HF.T)
        padding = len(candidates_C) - head_NH.shape[1]
        scored: torch.Tensor = scores_NC + functional.pad(head_NH, (0, padding))
        return scored


def _components(knowledge: Knowledge) -> torch.Tensor:
    """Give the bank's largest principal components, each with unit spread, (V, K)."""
    public = knowledge.public

    def build() -> dict[str, NDArray[Any]]:
        bank_VD = np.asarray(public.bank, dtype=np.float64)
        weight_V = np.sqrt(public.counts + 1.0)
        weight_V = weight_V / weight_V.sum()
        centred_VD = bank_VD - weight_V @ bank_VD
        covariance_DD = centred_VD.T @ (centred_VD * weight_V[:, None])
        variance_D, axes_DD = np.linalg.eigh(covariance_DD)
        kept = np.argsort(-variance_D)[:_COMPONENTS]
        scale_K = np.sqrt(np.maximum(variance_D[kept], 1e-12) * len(kept))
        return {"bank": (centred_VD @ axes_DD[:, kept] / scale_K).astype(np.float32)}

    return torch.tensor(
        np.array(public.cached("components", {"number": _COMPONENTS}, build)["bank"])
    )
