"""DP-SGD on a device: each example's gradient is clipped, and noise of the device's own is added.

Abadi et al., arXiv 1607.00133. Batches are Poisson samples; the noise is set so that all rounds
of a run together cost an example epsilon. What a batch holds, and the noise, come from generators
keyed by the device's secret, so that a retry has the same ones and the cloud cannot foresee them.
Legend: B sentences in a batch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from privtune_flwr.errors import Refusal
from privtune_flwr.federated.local import LocalResult, make_optimizer
from privtune_flwr.federated.methods import Work
from privtune_flwr.federated.whole import WholeModel, pad
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.training.trainer import span_factors

if TYPE_CHECKING:
    from privtune_flwr.federated.dp_optimizer import KeyedDPOptimizer

# gradients of examples that are in memory at once, in numbers: half a gigabyte
_GRADIENT_NUMBERS = 2**27
# opacus' orders end at 63, which gives no epsilon below log(1 / delta) / 62
_ORDERS = (
    *(1 + x / 10 for x in range(1, 100, 3)),
    *range(12, 64, 2),
    *(64, 80, 96, 128, 192, 256, 384, 512, 768, 1024),
)
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Budget:
    """What a run's DP-SGD costs on one device; the same in each of its rounds.

    Attributes
    ----------
    sample_rate : float
        Chance of an example to be in a batch.
    steps : int
        Steps of one pass: ``ceil(examples / batch-size)``, whatever the batches come to hold.
    passes : int
        Passes of the whole run.
    noise_multiplier : float
        Standard deviation of the noise in units of the clip.
    delta : float
    """

    sample_rate: float
    steps: int
    passes: int
    noise_multiplier: float
    delta: float

    def epsilon(self, passes: int | None = None) -> float:
        """Give epsilon after so many passes, by default all: add or remove one example."""
        steps = self.steps * (self.passes if passes is None else passes)
        return _epsilon(self.noise_multiplier, self.sample_rate, steps, self.delta)


def require_opacus() -> None:
    """Refuse DP-SGD where opacus is missing.

    Raises
    ------
    Refusal
        Naming the extra.
    """
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        import opacus  # noqa: F401  (only whether it can be had)
    except ImportError:
        raise Refusal(
            "request.settings: federated.example-privacy = 'dp-sgd' needs opacus on this device: "
            "pip install 'privtune-flwr[dp]'"
        ) from None
    finally:
        # it gives the root logger a handler, which would print every other library's lines twice
        for handler in [h for h in root.handlers if h not in before]:
            root.removeHandler(handler)


@lru_cache(maxsize=64)
def plan_budget(
    *, examples: int, batch_size: int, passes: int, epsilon: float, delta: float
) -> Budget:
    """Find the noise with which ``passes`` over the examples cost ``epsilon``.

    By opacus' Rényi accountant for Poisson samples: an upper bound, for which the noise is some
    7 % larger than for a numerical composition; it is found within 1 % of epsilon, from below.

    Parameters
    ----------
    examples : int
        Of this device.
    batch_size : int
        Expected size of a batch, at most.
    passes : int
        Passes of the whole run, over all its rounds.
    epsilon, delta : float
        Of an example, over the whole run.

    Raises
    ------
    Refusal
        If no noise reaches this epsilon.
    """
    require_opacus()
    from opacus.accountants.utils import get_noise_multiplier

    steps = -(-examples // batch_size)
    try:
        with _quiet():
            noise = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=1 / steps,
                steps=steps * passes,
                accountant="rdp",
                epsilon_tolerance=_TOLERANCE * epsilon,
                alphas=list(_ORDERS),
            )
    except ValueError:
        raise Refusal(
            f"request.settings: federated.epsilon = {epsilon:.6g}: too small to be reached"
        ) from None
    return Budget(1 / steps, steps, passes, float(noise), delta)


def train_privately(
    model: WholeModel, work: Work, *, epochs: int, progress: tuple[float, float]
) -> tuple[LocalResult, dict[str, float]]:
    """Train what ``model`` declares trainable with DP-SGD, in place.

    What comes after the noise (AdamW's moments, weight decay, FedProx's pull towards the weights
    that came) computes from noisy sums and from what the cloud sent, and costs nothing more.

    Parameters
    ----------
    model : WholeModel
        Starts from the state that is in it; clean of hooks afterwards.
    work : Work
        The examples, the round, ``proximal_mu`` and ``noise_key``.
    epochs : int
        Passes in this round; all rounds make as many.
    progress : (float, float)
        From which share of the run's schedule to which this training goes.

    Returns
    -------
    LocalResult
        Its sums are of the text and have no noise: they must not leave.
    dict
        ``epsilon`` spent up to and including this round, and ``delta``.

    Raises
    ------
    Refusal
        If opacus is missing or epsilon cannot be reached.
    ValueError
        If the noise has no key.
    """
    require_opacus()
    from privtune_flwr.federated.dp_optimizer import KeyedDPOptimizer, per_example_gradients

    train, federated = model.settings.train, model.settings.federated
    budget = plan_budget(
        examples=len(work.sequences),
        batch_size=train.batch_size,
        passes=work.rounds * epochs,
        epsilon=federated.epsilon,
        delta=federated.delta,
    )
    sampling = keyed_generator(work.noise_key, "dp-sgd", "sample")
    total = budget.steps * epochs
    loss_sum, correct, seen = 0.0, 0, 0
    model.train()
    with _dropout_from(work.seed), per_example_gradients(model):
        optimizer = KeyedDPOptimizer(
            make_optimizer(model),
            noise_multiplier=budget.noise_multiplier,
            max_grad_norm=federated.example_clip,
            expected_batch_size=len(work.sequences) * budget.sample_rate,
            rng=keyed_generator(work.noise_key, "dp-sgd", "noise"),
        )
        if work.proximal_mu > 0:
            _pull_back(optimizer, work.proximal_mu)
        base = [float(group["lr"]) for group in optimizer.param_groups]
        for factor in span_factors(total, progress, train):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            drawn = sampling.random(len(work.sequences)) < budget.sample_rate
            batch = np.flatnonzero(drawn).tolist()
            loss, right = private_step(model, optimizer, work, batch)
            loss_sum += loss
            correct += right
            seen += len(batch)
    spent = budget.epsilon(work.round * epochs)
    return LocalResult(total, loss_sum, correct, seen), {"epsilon": spent, "delta": budget.delta}


def private_step(
    model: WholeModel, optimizer: KeyedDPOptimizer, work: Work, batch: Sequence[int]
) -> tuple[float, int]:
    """Take one step on a Poisson sample, which may be empty; gives its loss and right answers.

    A sample that is too large for memory goes through in pieces: clipped sums add up.
    """
    optimizer.zero_grad(set_to_none=True)
    if not batch:
        # noise alone: a step that is left out would tell that nobody was drawn
        for parameter in optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        optimizer.step()
        return 0.0, 0
    numbers = sum(p.numel() for p in optimizer.params)
    size = max(1, _GRADIENT_NUMBERS // numbers)
    order = sorted(batch, key=lambda i: len(work.sequences[i]))
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    loss_sum, correct = 0.0, 0
    for piece in pieces:
        optimizer.zero_grad(set_to_none=True)
        ids_BT, mask_BT = pad([work.sequences[i] for i in piece])
        target_B = torch.tensor([work.labels[i] for i in piece])
        logits_BC = model(ids_BT, mask_BT)
        loss = nn.functional.cross_entropy(logits_BC, target_B, reduction="sum")
        torch.autograd.backward(loss)
        _check_complete(optimizer, len(piece))
        loss_sum += float(loss.detach())
        correct += int((logits_BC.argmax(1) == target_B).sum())
        optimizer.signal_skip_step(do_skip=piece is not pieces[-1])
        optimizer.step()
    return loss_sum, correct


def _check_complete(optimizer: KeyedDPOptimizer, examples: int) -> None:
    """Fail where a layer gave no gradient for each example: it could not be clipped by example."""
    for parameter in optimizer.params:
        found = parameter.grad_sample
        if not isinstance(found, torch.Tensor) or found.shape != (examples, *parameter.shape):
            raise ValueError("dp-sgd: a layer of this model has no gradient for each example")


def _pull_back(optimizer: KeyedDPOptimizer, mu: float) -> None:
    """Add FedProx's gradient, mu (w - w_0), after the noise: it depends on no example."""
    anchor = [p.detach().clone() for p in optimizer.params]

    def pull(_: object) -> None:
        for parameter, start in zip(optimizer.params, anchor, strict=True):
            parameter.grad += mu * (parameter.detach() - start)

    optimizer.attach_step_hook(pull)


@contextmanager
def _dropout_from(seed: int) -> Iterator[None]:
    """Fix dropout: the same noise on other gradients would show their difference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@lru_cache(maxsize=256)
def _epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with _quiet():
        return float(accountant.get_epsilon(delta=delta, alphas=list(_ORDERS)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence opacus' advice about orders: the bound holds at each order."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
