"""Learned inversion: a network from released rows to tokens, trained on the attacker's own text.

A weak learned attacker reads as privacy, so this one starts from the Gaussian solution and can only
leave it for something better on text it was not trained on; the formula is in
:mod:`privtune_flwr.audit.attacks.inverter`. Trained by cross entropy over the commonest tokens, the
batch's own tokens and a uniform sample of the others, weighted so that the normaliser is estimated
without bias.

Shapes: ``T`` tokens of one sentence, ``N`` rows, ``d`` width of a row, ``V`` vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privtune_flwr.audit.attacks.base import (
    Level,
    Released,
    Tell,
    silent,
)
from privtune_flwr.audit.attacks.inverter import Batch, Inverter, Network, Truth
from privtune_flwr.audit.attacks.trained import TrainedAttack, divided
from privtune_flwr.models.bottom import length_sorted_batches

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge, Pair

NETWORKS: tuple[Network, ...] = get_args(Network)

_BATCH_TOKENS = 1024
_GUESS_TOKENS = 2048
_RATE = 5e-4
_WARM_UP = 20
_CHECKS = 6  # validations over all steps
_PATIENCE = 3


class Learned(TrainedAttack):
    """A residual network on top of the Gaussian attacker.

    Below the level ``adaptive`` it is trained on clean pairs, as the paper's attacker is; from
    there on on pairs passed through the mechanism, drawn afresh each time they are used.

    Parameters
    ----------
    level : Level
        How much the attacker knows.
    network : {"mlp", "sequence"}
        Sees one row, or its whole sentence.
    steps, tokens, seed
        As in :class:`TrainedAttack`.

    Raises
    ------
    ValueError
        If there is no such network or a count is not positive.
    """

    def __init__(
        self, level: Level, *, network: Network, steps: int, tokens: int, seed: int = 0
    ) -> None:
        super().__init__(level, steps=steps, tokens=tokens, seed=seed)
        if network not in NETWORKS:
            raise ValueError(f"network = {network!r}: allowed: {', '.join(NETWORKS)}")
        self._network: Network = network

    @property
    def name(self) -> str:
        """``learned-mlp`` or ``learned-sequence``."""
        return f"learned-{self._network}"

    def fit(self, knowledge: Knowledge, released: Released, tell: Tell = silent) -> None:
        """Train on the attacker's own text; the released rows are not looked at.

        Raises
        ------
        ValueError
            If the mechanism is known not to add noise to rows: then there is no such start.
        """
        if not knowledge.additive:
            raise ValueError(f"{knowledge.mechanism.name} is not additive: use FromScratch")
        self._log_prior_V = np.log(knowledge.prior)
        pairs = knowledge.clean(self._tokens)
        held_out, training = divided(pairs)
        validation = [p._replace(rows=knowledge.perturb(p, 0, i)) for i, p in enumerate(held_out)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            self._model = Inverter(knowledge, self._network)
            self._model.eval()
            self._train(knowledge, training, (held_out, validation), tell)
        self._model.calibrate(held_out, validation)
        tell(1.0)

    def guess(self, released: Released, k: int = 1, tell: Tell = silent) -> list[NDArray[np.int64]]:
        """List the likeliest tokens, many sentences at once."""
        guesses = [np.empty((0, k), np.int64) for _ in released.rows]
        done = 0
        for batch in length_sorted_batches(released.lengths, _GUESS_TOKENS):
            scores_NV = self._model.scores([released.rows[i] for i in batch])
            best_Nk = scores_NV.topk(k, dim=1).indices.numpy()
            ends = np.cumsum([released.lengths[i] for i in batch])
            for i, best in zip(batch, np.split(best_Nk, ends[:-1]), strict=True):
                guesses[i] = best.copy()
            done += len(batch)
            tell(done / len(guesses))
        return guesses

    def log_posterior(self, rows_TD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give log p(v | the sentence's rows), (T, V).

        What ``sequence`` has learned of context is in it, beside :meth:`log_prior`.
        """
        posterior_TV = torch.log_softmax(self._model.scores([rows_TD]), dim=1).numpy()
        return np.asarray(posterior_TV, dtype=np.float32)

    def _train(
        self,
        knowledge: Knowledge,
        training: list[Pair],
        validation: tuple[list[Pair], list[Pair]],
        tell: Tell,
    ) -> None:
        model = self._model
        optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda s: min((s + 1) / _WARM_UP, max(0.02, 1 - s / self._steps))
        )
        best = copy.deepcopy(model.state_dict())
        lowest = model.loss(*validation)
        self._checked = [(0, lowest)]
        waited = 0
        every = max(1, self._steps // _CHECKS)
        for step, batch in zip(
            range(1, self._steps + 1), self._batches(knowledge, training), strict=False
        ):
            model.train()
            optimiser.zero_grad()
            model.sampled_loss(*batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            model.eval()
            tell(0.95 * step / self._steps)
            if step % every and step != self._steps:
                continue
            self._checked.append((step, model.loss(*validation)))
            if self._checked[-1][1] < lowest:
                lowest, waited, best = self._checked[-1][1], 0, copy.deepcopy(model.state_dict())
            else:
                waited += 1
                if waited == _PATIENCE:
                    break
        model.load_state_dict(best)

    def _batches(self, knowledge: Knowledge, pairs: list[Pair]) -> Iterator[tuple[Batch, Truth]]:
        """Give batches without end, composed and perturbed afresh each time round."""
        rng = np.random.default_rng(self._seed)
        for epoch in itertools.count(1):
            order = rng.permutation(len(pairs))
            batches = length_sorted_batches([len(pairs[i].ids) for i in order], _BATCH_TOKENS)
            for place in rng.permutation(len(batches)):
                chosen = [int(order[i]) for i in batches[place]]
                rows = [knowledge.perturb(pairs[i], epoch, i) for i in chosen]
                yield self._model.padded(rows), self._model.truth([pairs[i] for i in chosen])
