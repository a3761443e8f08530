"""Optimisation: relaxed token mixtures, matched to released rows through the known bottom model.

Every position holds a mixture over K candidate tokens. The mixtures' word embeddings go through the
frozen blocks; what comes out, plus the mixtures' expected shift where the mechanism is known,
should be the released rows. Minimised over the mixtures' logits by Adam, per sentence:

    sum_t |y_t - x_t(mixtures) - shift_t|^2_S / 2 - sum log prior + annealed entropy,

with S the covariance of the known noise (of the clean rows where it is unknown). Unlike an attack
that takes rows one by one, it explains a row's context by the sentence's other tokens.

Shapes: ``B`` sentences, ``T`` tokens, ``N`` rows, ``K`` candidates, ``d`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Attack, Family, Level, Released, Tell, silent
from privtune_flwr.models.bottom import length_sorted_batches

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge

_BATCH_TOKENS = 512
_RATE = 0.1
_ENTROPY = 1.0  # nats' weight of the mixtures' entropy at the end; none at the start
_NOISE_TOKENS = 4000
_RIDGE = 0.01


class Optimisation(Attack):
    """Search for the sentence whose representations are the released rows.

    Parameters
    ----------
    level : Level
        How much the attacker knows; ``unaware`` matches the rows as if they were clean.
    steps : int
        Of Adam, for each batch of sentences.
    candidates : int
        Tokens a position may become: those that the Gaussian of this level takes for likeliest.
    sentences : int
        How many sentences it is shown at most; it costs a pass through the bottom model and back
        for each step.

    Raises
    ------
    ValueError
        If a count is not positive.
    """

    family: ClassVar[Family] = "optimisation"

    def __init__(
        self, level: Level, *, steps: int = 60, candidates: int = 16, sentences: int = 50
    ) -> None:
        super().__init__(level)
        if min(steps, candidates, sentences) < 1:
            raise ValueError("steps, candidates and sentences must be positive")
        self._steps, self._candidates, self._sentences = steps, candidates, sentences

    @property
    def name(self) -> str:
        """``optimisation``."""
        return "optimisation"

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Steps, candidates and sentences."""
        return {
            "steps": self._steps,
            "candidates": self._candidates,
            "sentences": self._sentences,
        }

    @property
    def sentences(self) -> int | None:
        """How many sentences it is shown at most."""
        return self._sentences

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Take the Gaussian for candidates; learn the noise's covariance."""
        self._bottom = knowledge.bottom
        self._gaussian = knowledge.posterior()
        self._log_prior_V = torch.tensor(np.log(knowledge.prior), dtype=torch.float32)
        shift_VD = knowledge.shift
        self._shift_VD = None if shift_VD is None else torch.tensor(shift_VD)
        self._whiten_DD = _whitening(knowledge)
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """Rank each position's candidates by their weight in its mixture."""
        guesses = [np.empty((0, k), np.int64) for _ in released.rows]
        batches = length_sorted_batches(released.lengths, _BATCH_TOKENS)
        for done, batch in enumerate(batches):

            def part(share: float, before: int = done) -> None:
                tell((before + share) / len(batches))

            rows = [np.asarray(released.rows[i], dtype=np.float32) for i in batch]
            best_Nk = self._search(rows, part, k)
            ends = np.cumsum([len(r) for r in rows])
            for i, best in zip(batch, np.split(best_Nk, ends[:-1]), strict=True):
                guesses[i] = best.copy()
        return guesses

    def _search(self, rows: list[NDArray[np.float32]], tell: Tell, k: int) -> NDArray[np.int64]:
        count = max(k, self._candidates)
        stacked = np.concatenate(rows)
        scores_NK, tokens_NK = self._likeliest(stacked, count)
        lengths = torch.tensor([len(r) for r in rows])
        real_BT = torch.arange(int(lengths.max())) < lengths[:, None]
        table_VD = self._bottom.base.get_input_embeddings().weight.detach()
        words_NKD = table_VD[tokens_NK].float()
        shift_NKD = None if self._shift_VD is None else self._shift_VD[tokens_NK]
        released_ND = torch.from_numpy(stacked)
        logits_NK = scores_NK.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits_NK], lr=_RATE)
        for step in range(self._steps):
            weights_NK = logits_NK.softmax(dim=1)
            produced_ND = self._pass(torch.einsum("nk,nkd->nd", weights_NK, words_NKD), real_BT)
            if shift_NKD is not None:
                produced_ND = produced_ND + torch.einsum("nk,nkd->nd", weights_NK, shift_NKD)
            misfit = ((released_ND - produced_ND) @ self._whiten_DD).square().sum() / 2
            entropy = -(weights_NK * logits_NK.log_softmax(dim=1)).sum()
            unlikely = -(weights_NK * self._log_prior_V[tokens_NK]).sum()
            loss = misfit + unlikely + (_ENTROPY * step / self._steps) * entropy
            (logits_NK.grad,) = torch.autograd.grad(loss, [logits_NK])
            optimiser.step()
            tell((step + 1) / self._steps)
        order_NK = logits_NK.detach().topk(k, dim=1).indices
        return np.asarray(tokens_NK.gather(1, order_NK).numpy())

    def _likeliest(self, rows_ND: NDArray[np.float32], count: int) -> tuple[torch.Tensor, ...]:
        scores_NV = torch.from_numpy(self._gaussian.log_posterior(rows_ND))
        return scores_NV.topk(count, dim=1)

    def _pass(self, words_ND: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Send word embeddings through the frozen model; positions are added inside."""
        padded_BTD = words_ND.new_zeros(*real_BT.shape, words_ND.shape[1])
        padded_BTD = padded_BTD.masked_scatter(real_BT[..., None], words_ND)
        output = self._bottom.base(inputs_embeds=padded_BTD, attention_mask=real_BT.long())
        hidden_ND: torch.Tensor = output.last_hidden_state[real_BT].float()
        return hidden_ND


def _whitening(knowledge: Knowledge) -> torch.Tensor:
    """Give W with W W' the inverse covariance of the known noise, or of rows about their means.

    A ridge on the scale of the latter leaves the approximation room where there is no noise.
    """
    pairs = knowledge.clean(_NOISE_TOKENS)
    ids_N = np.concatenate([p.ids for p in pairs])
    clean_ND = np.concatenate([p.rows for p in pairs])
    expected_ND = clean_ND if knowledge.shift is None else clean_ND + knowledge.shift[ids_N]
    noise_ND = np.concatenate([knowledge.perturb(p, i) for i, p in enumerate(pairs)]) - expected_ND
    context_ND = clean_ND - knowledge.clean_means[ids_N]
    spread_ND = noise_ND if knowledge.aware else context_ND
    covariance_DD = spread_ND.T.astype(np.float64) @ spread_ND / len(ids_N)
    ridge = _RIDGE * np.mean(np.square(context_ND.astype(np.float64)))
    covariance_DD += ridge * np.eye(len(covariance_DD))
    factor_DD = np.linalg.cholesky(covariance_DD)
    return torch.tensor(np.linalg.inv(factor_DD).T, dtype=torch.float32)
