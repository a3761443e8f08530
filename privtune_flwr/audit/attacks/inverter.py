"""The network of the learned inversion.

With q the whitened row, m_v the whitened class means of the Gaussian and pi_v the prior, the score
of token v is

    g (q . m_v - |m_v|^2 / 2) + f . m_v / rms|m| + h . e_v + log pi_v,

where the network gives g, f and h from the rows and starts at g = 1, f = h = 0, which is the
Gaussian. Beside q the network is given the Gaussian's posterior mean of a learned table over the
commonest tokens: a denoised view. e_v is learned but for two traits, how often v occurs in the
attacker's text and whether it does at all, so that the strength of the prior is learned too.

The class means contain the very rows that a network is trained on, little else for a rare token:
trained so, it would take rare tokens for sure. While it learns and is validated, a batch's own
rows are therefore taken out of means and counts (leave-one-out, exact for the tables above).

Shapes: ``B`` sentences, ``T`` tokens, ``N`` rows, ``d`` width of a row, ``V`` vocabulary, ``H``
commonest tokens (head), ``C`` candidates, ``W`` width of the network, ``R`` rank of e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from privtune_flwr.privacy.privtune.bank import context_free

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair
    from privtune_flwr.privacy.privtune.posterior import ShiftPosterior

Network = Literal["mlp", "sequence"]

_HEAD = 2048
_HARD, _TAIL = 1024, 256  # further candidates a batch: likeliest ones, sampled ones
_WIDTH = 256
_RANK = 64
_TRAITS = 2
_RARE = 3  # tokens this rare have a mean without context ready, for when nothing is left
_PSEUDO_COUNT = 0.1
_HEADS, _LAYERS, _KERNEL = 4, 2, 5
_DROPOUT = 0.1
_TIED = 1e-6  # nats a token
_SCALES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3)


class Batch(NamedTuple):
    """Sentences padded together: whitened rows, and which of them are real."""

    white_BTD: torch.Tensor
    real_BT: torch.Tensor


class Truth(NamedTuple):
    """The tokens of a batch, and what is known of them without that batch."""

    ids_N: torch.Tensor
    own_U: torch.Tensor
    means_UD: torch.Tensor
    counts_U: torch.Tensor


class _Tables(NamedTuple):
    """What tokens are compared by: all of them, or candidates."""

    means_CD: torch.Tensor
    counts_C: torch.Tensor
    extra_CR: torch.Tensor


class Inverter(nn.Module):
    """Scores of all tokens from whitened rows; see the module's docstring for the formula.

    Parameters
    ----------
    knowledge : Knowledge
        Gives the Gaussian to start from.
    network : {"mlp", "sequence"}
        Sees one row, or its whole sentence.
    """

    def __init__(self, knowledge: Knowledge, network: Network) -> None:
        super().__init__()
        self.gaussian: ShiftPosterior = knowledge.posterior()
        self.shift_VD = knowledge.shift
        self.means_VD = self.gaussian.whitened_means.contiguous()
        width = self.means_VD.shape[1]
        self.half_V = self.means_VD.square().sum(dim=1) / 2
        self.norm = float((2 * self.half_V.mean()).sqrt())
        self.counts_V = torch.tensor(knowledge.counts, dtype=torch.float32)
        self.log_total = math.log(float((self.counts_V + _PSEUDO_COUNT).sum()))
        order_V = np.argsort(-knowledge.counts, kind="stable")
        self.head_H = torch.from_numpy(order_V[:_HEAD].copy())
        self.seen = torch.from_numpy(order_V[_HEAD : int((knowledge.counts > 0).sum())].copy())
        rare = np.flatnonzero((knowledge.counts > 0) & (knowledge.counts <= _RARE))
        self.alone_VD = self._without_context(knowledge, rare)
        self.scale = 1.0
        # Like tokens have like entries at the start.
        self.extra_VR = nn.Parameter(self.means_VD @ torch.randn(width, _RANK) / self.norm)
        table_HW = self.means_VD[self.head_H] @ torch.randn(width, _WIDTH) / self.norm
        self.denoised_HW = nn.Parameter(table_HW)
        self.norm_rows = nn.LayerNorm(width)
        self.rows_in = nn.Linear(width, _WIDTH)
        self.body: nn.Module = _Rows() if network == "mlp" else _Sentence()
        self.out = nn.Linear(_WIDTH, 1 + width + _RANK + _TRAITS)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give g (N, 1), the query on the means (N, d) and that on the extra table (N, r)."""
        white_BTD, real_BT = batch
        white_ND = white_BTD[real_BT]
        with torch.no_grad():
            head_NH = torch.softmax(self._gaussian_scores(white_ND, self.head_H), dim=1)
        into_NW = self.rows_in(self.norm_rows(white_ND)) + head_NH @ self.denoised_HW
        into_BTW = into_NW.new_zeros(*real_BT.shape, _WIDTH)
        into_BTW[real_BT] = into_NW
        out_N = self.out(self.body(into_BTW, real_BT)[real_BT])
        change_N, query_ND, extra_NR = out_N.split([1, white_ND.shape[1], _RANK + _TRAITS], dim=1)
        certainty_N = torch.exp(change_N)
        return certainty_N, certainty_N * white_ND + query_ND / self.norm, extra_NR

    def sampled_loss(self, batch: Batch, truth: Truth) -> torch.Tensor:
        """Estimate the cross entropy from the tokens that matter in the batch and a sample.

        Those that matter are the head, the batch's own tokens and what the Gaussian takes for
        likely; a sampled one stands for as many as were not drawn.
        """
        with torch.no_grad():
            scores_NS = self._gaussian_scores(batch.white_BTD[batch.real_BT], self.seen)
            likely_S = scores_NS.log_softmax(dim=1).amax(dim=0)
        hard = self.seen[likely_S.topk(min(_HARD, len(self.seen))).indices]
        chosen_V = torch.zeros(len(self.means_VD), dtype=torch.bool)
        chosen_V[self.head_H] = chosen_V[hard] = chosen_V[truth.ids_N] = True
        others = (~chosen_V).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others))[:_TAIL]]
        candidates_C = torch.cat([chosen_V.nonzero()[:, 0], drawn])
        weight_C = torch.zeros(len(candidates_C))
        if len(drawn):
            weight_C[-len(drawn) :] = math.log(len(others) / len(drawn))
        place_V = torch.full((len(self.means_VD),), -1)
        place_V[candidates_C] = torch.arange(len(candidates_C))
        own_U = place_V[truth.own_U]
        tables = _Tables(
            self.means_VD[candidates_C].index_copy(0, own_U, truth.means_UD),
            self.counts_V[candidates_C].index_copy(0, own_U, truth.counts_U),
            self.extra_VR[candidates_C],
        )
        bias_C, scores_NC = self._scored(self(batch), tables)
        return functional.cross_entropy(scores_NC + (bias_C + weight_C), place_V[truth.ids_N])

    def loss(self, clean: Sequence[Pair], released: Sequence[Pair]) -> float:
        """Give the cross entropy over the whole vocabulary, the sentences' own rows left out."""
        return self._losses(clean, released, (self.scale,))[0]

    @torch.inference_mode()
    def scores(self, rows: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        """Give log p(v | rows) up to a constant a row, (N, V), of whole sentences."""
        tables = _Tables(self.means_VD, self.counts_V, self.extra_VR)
        bias_V, scores_NV = self._scored(self(self.padded(rows)), tables)
        return scores_NV.mul_(self.scale).add_(bias_V)

    def calibrate(self, clean: Sequence[Pair], released: Sequence[Pair]) -> None:
        """Choose the scale of everything but the prior by held-out loss; the mildest of equals."""
        losses = np.asarray(self._losses(clean, released, _SCALES))
        equal = np.flatnonzero(losses <= losses.min() + _TIED)
        self.scale = min((_SCALES[int(i)] for i in equal), key=lambda scale: abs(np.log(scale)))

    def padded(self, rows: Sequence[NDArray[np.float32]]) -> Batch:
        """Whiten and pad sentences."""
        lengths = torch.tensor([len(r) for r in rows])
        real_BT = torch.arange(int(lengths.max())) < lengths[:, None]
        white_ND = self.gaussian.whitened(np.concatenate(rows))
        white_BTD = white_ND.new_zeros(*real_BT.shape, white_ND.shape[1])
        white_BTD[real_BT] = white_ND
        return Batch(white_BTD, real_BT)

    def truth(self, clean: Sequence[Pair]) -> Truth:
        """Take sentences' own rows out of the means and counts of their tokens."""
        ids_N = torch.from_numpy(np.concatenate([p.ids for p in clean])).long()
        expected_ND = np.concatenate([p.rows for p in clean])
        if self.shift_VD is not None:
            expected_ND = expected_ND + self.shift_VD[ids_N.numpy()]
        apart_ND = self.gaussian.whitened(expected_ND) - self.means_VD[ids_N]
        own_U, place_N, taken_U = ids_N.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        apart_UD = torch.zeros(len(own_U), apart_ND.shape[1]).index_add_(0, place_N, apart_ND)
        counts_U = self.counts_V[own_U] - taken_U
        means_UD = self.means_VD[own_U] - apart_UD / counts_U.clamp(min=1)[:, None]
        gone_U = counts_U < 1
        means_UD[gone_U] = self.alone_VD[own_U[gone_U]]
        return Truth(ids_N, own_U, means_UD, counts_U.clamp(min=0))

    @torch.inference_mode()
    def _losses(
        self, clean: Sequence[Pair], released: Sequence[Pair], scales: Sequence[float]
    ) -> list[float]:
        asked = self(self.padded([p.rows for p in released]))
        truth = self.truth(clean)
        tables = _Tables(
            self.means_VD.index_copy(0, truth.own_U, truth.means_UD),
            self.counts_V.index_copy(0, truth.own_U, truth.counts_U),
            self.extra_VR,
        )
        bias_V, scores_NV = self._scored(asked, tables)
        return [
            float(functional.cross_entropy(bias_V + scale * scores_NV, truth.ids_N))
            for scale in scales
        ]

    def _without_context(self, knowledge: Knowledge, rare: NDArray[np.int64]) -> torch.Tensor:
        """Class means as they would be of tokens that the text lacked, (V, d)."""
        public = knowledge.public
        known = np.flatnonzero((public.counts > 0) & (public.counts <= _RARE))
        table = public.cached(
            "context-free",
            {"rare": _RARE},
            lambda: {"rows": context_free(knowledge.bottom, public.tokenizer, known)},
        )
        # what the public text lacks has no other entry in the bank
        rows_VD = np.array(public.bank, dtype=np.float32)
        rows_VD[known] = table["rows"]
        rows_RD = rows_VD[rare]
        if self.shift_VD is not None:
            rows_RD = rows_RD + self.shift_VD[rare]
        alone_VD = self.means_VD.clone()
        alone_VD[torch.from_numpy(rare)] = self.gaussian.whitened(rows_RD)
        return alone_VD

    def _scored(
        self, asked: tuple[torch.Tensor, torch.Tensor, torch.Tensor], tables: _Tables
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the log prior (C,) and everything else of the score (N, C)."""
        certainty_N, query_ND, extra_NR = asked
        log_counts_C = (tables.counts_C + _PSEUDO_COUNT).log()
        traits_C2 = torch.stack([log_counts_C / 3, (tables.counts_C == 0).float()], dim=1)
        table_CE = torch.cat(
            [
                tables.means_CD,
                tables.extra_CR,
                traits_C2,
                -tables.means_CD.square().sum(1, True) / 2,
            ],
            dim=1,
        )
        query_NE = torch.cat([query_ND, extra_NR, certainty_N], dim=1)
        return log_counts_C - self.log_total, query_NE @ table_CE.T

    def _gaussian_scores(self, white_ND: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        bias = (self.counts_V[tokens] + _PSEUDO_COUNT).log() - self.half_V[tokens]
        return torch.addmm(bias, white_ND, self.means_VD[tokens].T)


class _Rows(nn.Module):
    """Each row by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(_WIDTH),
            nn.Linear(_WIDTH, 2 * _WIDTH),
            nn.GELU(),
            nn.Linear(2 * _WIDTH, _WIDTH),
        )
        self.last = nn.LayerNorm(_WIDTH)

    def forward(self, into_BTW: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(into_BTW + self.layers(into_BTW))
        return result


class _Sentence(nn.Module):
    """Neighbours by a convolution, the rest of the sentence by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LayerNorm(_WIDTH)
        self.near = nn.Conv1d(_WIDTH, _WIDTH, _KERNEL, padding=_KERNEL // 2)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, _HEADS, 2 * _WIDTH, _DROPOUT, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.last = nn.LayerNorm(_WIDTH)

    def forward(self, into_BTW: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        into_BTW = self.first(into_BTW) * real_BT[..., None]
        near_BTW = self.near(into_BTW.transpose(1, 2)).transpose(1, 2)
        placed_BTW = into_BTW + functional.gelu(near_BTW) + _positions(into_BTW.shape[1])
        result: torch.Tensor = self.last(self.encoder(placed_BTW, src_key_padding_mask=~real_BT))
        return result


def _positions(length: int) -> torch.Tensor:
    """Sines and cosines of positions, (T, w), as in Vaswani et al. (2017)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(0, _WIDTH, 2) / _WIDTH)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
