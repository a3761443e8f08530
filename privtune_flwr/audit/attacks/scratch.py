"""Reading narrow rows by their sentence: a transformer trained from scratch on own releases.

Where rows are a few numbers that depend on context, a single row tells little and the Gaussian is
no place to start from; what a sentence's rows tell together is learned. Public and in-domain text
first, then in-domain text alone, each until the loss on held-out text has stopped falling. At the
end the network is mixed with a memoryless attack (counts of symbols, else the Gaussian) as far as
that helps on held-out text, so that it is not worse than either.

Shapes: ``T`` tokens of one sentence, ``N`` rows, ``r`` width of a row, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from privtune_flwr.audit.attacks.base import (
    Level,
    PosteriorAttack,
    Released,
    Tell,
    silent,
)
from privtune_flwr.audit.attacks.counts import MOST_SYMBOLS, Counts
from privtune_flwr.audit.attacks.exact import Exact
from privtune_flwr.audit.attacks.gaussian import Gaussian
from privtune_flwr.audit.attacks.levels import Levels
from privtune_flwr.audit.attacks.reader import Reader
from privtune_flwr.audit.attacks.retrieval import NearestEntries
from privtune_flwr.audit.attacks.trained import TrainedAttack, divided
from privtune_flwr.models.bottom import length_sorted_batches

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair

_BATCH_TOKENS = 1024
_GUESS_TOKENS = 1024
_RATE = 1e-3
_WARM_UP = 30
_CHECKS = 12  # validations over all steps
_PATIENCE = 3
_LAST = 0.35  # of the steps: in-domain text alone
_TRUSTS = (0.7, 0.85, 1.0)
_NEVER = -30.0  # nats
_SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)


class FromScratch(TrainedAttack):
    """A sequence transformer that starts from word frequencies.

    Parameters
    ----------
    level : Level
        ``adaptive`` at least: its text passes through the mechanism.
    steps, tokens, seed
        As in :class:`TrainedAttack`; step 0 guesses by frequency.

    Raises
    ------
    ValueError
        If the level is ``unaware`` or a count is not positive.
    """

    def __init__(self, level: Level, *, steps: int, tokens: int, seed: int = 0) -> None:
        if level == "unaware":
            raise ValueError("an attacker of level unaware cannot release text of its own")
        super().__init__(level, steps=steps, tokens=tokens, seed=seed)

    @property
    def name(self) -> str:
        """``learned-from-scratch``."""
        return "learned-from-scratch"

    def held_out(self, knowledge: Knowledge) -> list[Pair]:
        """Give the releases that it was validated on, not trained."""
        return self._held_out

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Train on the attacker's own text; the released rows are not looked at."""
        self._log_prior_V = np.log(knowledge.prior)
        self._held_out, training = divided(knowledge.released(self._tokens))
        clean = knowledge.clean(self._tokens)[len(self._held_out) :]
        # chance must not be learned by heart; where each draw costs a pass, one has to do
        again_TR = knowledge.perturb(clean[0], 9, 0)
        by_chance = not np.array_equal(again_TR, training[0].rows)
        self._fresh = clean if by_chance and knowledge.mechanism.reads == "rows" else None
        channel = knowledge.mechanism.channel()
        self._codes = None if channel is None else NearestEntries(channel.codebook_cd)
        [rows_NR] = self._seen([np.concatenate([p.rows for p in training])])
        levels = Levels.of(rows_NR)
        if channel is not None:
            levels = Levels([np.arange(len(channel.codebook_cd), dtype=np.float64)])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._model = Reader(knowledge, rows_NR, levels)
            self._model.eval()
            inside = {id(ids) for ids in knowledge.in_domain}
            own = [i for i, p in enumerate(training) if id(p.ids) in inside]
            self._train(knowledge, training, own, lambda share: tell(0.9 * share))
        self._single: PosteriorAttack = Gaussian(self.level)
        if channel is not None:
            self._single = Exact(self.level)
        elif levels is not None and levels.symbols <= MOST_SYMBOLS:
            self._single = Counts(self.level, tokens=self._tokens)
        self._single.prepare(knowledge, released)
        self._trust, self._share = self._mixed()
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the likeliest tokens, several sentences at once."""
        guesses = [np.empty((0, k), np.int64) for _ in released.rows]
        done = 0
        for batch in length_sorted_batches(released.lengths, _GUESS_TOKENS):
            rows = [np.asarray(released.rows[i], dtype=np.float32) for i in batch]
            best_Nk = self._scores(rows).topk(k, dim=1).indices.numpy()
            ends = np.cumsum([len(r) for r in rows])
            for i, best in zip(batch, np.split(best_Nk, ends[:-1]), strict=True):
                guesses[i] = best.copy()
            done += len(batch)
            tell(done / len(guesses))
        return guesses

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | the sentence's rows), (T, V); what it learned of context is in it."""
        scores_TV = self._scores([np.asarray(rows_TD, dtype=np.float32)])
        return np.asarray(scores_TV.log_softmax(dim=1).numpy(), dtype=np.float32)

    def _scores(self, rows: Sequence[NDArray[np.float32]]) -> torch.Tensor:
        """Mix network and memoryless attack: log-posteriors up to a constant a row, (N, V)."""
        scores_NV = self._model.log_posterior(self._seen(rows)).mul(self._trust)
        if self._share:
            scores_NV.add_(self._told(np.concatenate(rows)), alpha=self._share)
        return scores_NV

    def _seen(self, rows: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Show the network rows of a known codebook by their codewords' numbers."""
        if self._codes is None:
            return list(rows)
        return [self._codes.top(r).astype(np.float32) for r in rows]

    def _told(self, rows_NR: NDArray[np.float32]) -> torch.Tensor:
        """Give what single rows tell: log p(row | v) up to a constant a row, (N, V)."""
        prior_V = self._single.log_prior().astype(np.float32)
        told_NV = self._single.log_posterior(rows_NR) - prior_V
        # a table's "cannot be" stays a number
        return torch.from_numpy(np.maximum(told_NV, _NEVER))

    def _mixed(self) -> tuple[float, float]:
        """Choose trust in the network and share of the other by held-out loss."""
        losses = np.zeros((len(_TRUSTS), len(_SHARES)))
        for pair in self._held_out[::2]:  # 18 losses over the vocabulary each: half will do
            read_TV = self._model.log_posterior(self._seen([pair.rows]))
            told_TV = self._told(pair.rows)
            ids_T = torch.from_numpy(pair.ids).long()
            for (t, trust), (s, share) in itertools.product(enumerate(_TRUSTS), enumerate(_SHARES)):
                mixed_TV = read_TV * trust + told_TV * share
                losses[t, s] += float(functional.cross_entropy(mixed_TV, ids_T, reduction="sum"))
        best = divmod(int(losses.argmin()), len(_SHARES))
        return _TRUSTS[best[0]], _SHARES[best[1]]

    def _train(
        self, knowledge: Knowledge, training: list[Pair], own: list[int], tell: Tell
    ) -> None:
        """All text first, in-domain text alone last; whatever was best on held-out text stays."""
        model = self._model
        optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
        last = int(_LAST * self._steps) if own and len(own) < len(training) else 0
        lowest, best = self._loss(), copy.deepcopy(model.state_dict())
        self._checked, step = [(0, lowest)], 0
        every = max(1, self._steps // _CHECKS)
        everything = list(range(len(training)))
        for phase, (chosen, until) in enumerate(
            ((everything, self._steps - last), (own, self._steps))
        ):
            batches, waited = self._batches(knowledge, training, chosen, phase), 0
            model.load_state_dict(best)
            while step < until and waited < _PATIENCE:
                for group in optimiser.param_groups:
                    group["lr"] = _RATE * min((step + 1) / _WARM_UP, 1.02 - step / self._steps)
                model.train()
                optimiser.zero_grad()
                model.sampled_loss(*next(batches)).backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                model.eval()
                step += 1
                tell(step / self._steps)
                if step % every and step != until:
                    continue
                loss, waited = self._loss(), waited + 1
                self._checked.append((step, loss))
                if loss < lowest:
                    lowest, best, waited = loss, copy.deepcopy(model.state_dict()), 0
            step = max(step, until)
        model.load_state_dict(best)

    def _loss(self) -> float:
        """Give the cross entropy over the whole vocabulary on held-out text."""
        pairs = self._held_out
        total, number = 0.0, 0
        for batch in length_sorted_batches([len(p.ids) for p in pairs], _GUESS_TOKENS):
            read_NV = self._model.log_posterior(self._seen([pairs[i].rows for i in batch]))
            ids_N = torch.from_numpy(np.concatenate([pairs[i].ids for i in batch])).long()
            total += float(functional.nll_loss(read_NV, ids_N, reduction="sum"))
            number += len(ids_N)
        return total / number

    def _batches(
        self, knowledge: Knowledge, training: list[Pair], chosen: list[int], phase: int
    ) -> Iterator[tuple[list[NDArray[np.float32]], torch.Tensor]]:
        """Give batches without end, composed, and where it costs little perturbed, afresh."""
        rng = np.random.default_rng([self._seed, phase])
        for epoch in itertools.count():
            order = rng.permutation(chosen)
            batches = length_sorted_batches([len(training[i].ids) for i in order], _BATCH_TOKENS)
            for place in rng.permutation(len(batches)):
                taken = [int(order[i]) for i in batches[place]]
                ids_N = torch.from_numpy(np.concatenate([training[i].ids for i in taken])).long()
                rows = [training[i].rows for i in taken]
                if self._fresh is not None:
                    identity = 10 + phase, epoch
                    rows = [knowledge.perturb(self._fresh[i], *identity, i) for i in taken]
                yield self._seen(rows), ids_N
