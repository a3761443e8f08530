"""The parts of DP-SGD that opacus computes, fitted to whole models and to keyed noise.

Needs the extra ``dp``: import it where DP-SGD is asked for and nowhere else.
Legend: B sentences in a batch, T tokens, P prompt tokens, D hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privtune_flwr.federated.whole import WholeModel

# what opacus leaves on modules and parameters beyond what its own clean-up knows
_ON_MODULES = ("activations", "max_batch_len")
_ON_PARAMETERS = ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample")


class KeyedDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """opacus' optimiser with noise from a generator that is keyed by the device's secret.

    opacus draws from torch's generators, whose seed has 64 bits at most, unless ``torchcsprng`` is
    there. Here the noise is ChaCha20's. It is drawn and added in float64 and the sum is rounded to
    the parameters' float32: what leaves does not show the generator's own grid of floats.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Takes the step.
    noise_multiplier : float
        Standard deviation of the noise in units of the clip; 0 = none.
    max_grad_norm : float
        Clip C: largest L2 norm of an example's gradient over all parameters.
    expected_batch_size : float
        Sample rate times examples: what the noisy sum is divided by.
    rng : numpy.random.Generator
        Of :func:`privtune_flwr.privacy.keyed.keyed_generator`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction="mean",
        )
        self._rng = rng

    def clip_and_accumulate(self) -> None:
        """Clip each example's gradient; one that is not finite counts as far as it is.

        The state comes from the cloud, which could make one example's gradient NaN. Unbounded it
        would spoil the sum, and the refusal that follows would tell that the example is there.
        """
        for parameter in self.params:
            torch.nan_to_num_(parameter.grad_sample, nan=0.0, posinf=0.0, neginf=0.0)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Add Gaussian noise of standard deviation ``noise_multiplier * C`` to the clipped sum."""
        scale = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad.double()
            if scale > 0:
                noise = torch.from_numpy(self._rng.standard_normal(tuple(total.shape)))
                total += scale * noise.to(total.device)
            parameter.grad = total.to(parameter.dtype).view_as(parameter)


@contextmanager
def per_example_gradients(model: WholeModel) -> Iterator[None]:
    """Have a backward pass of a *summed* loss fill ``grad_sample`` of what ``model`` trains.

    opacus' hooks do it, with two things that they lack here. Tables of positions are looked up
    once for a batch, in a row of batch size 1: the row is repeated, so that each sentence has a
    gradient of its own. A soft prompt is a bare parameter: its gradient is read off the rows that
    it takes in the top model's input. Afterwards the model is as it was.
    """
    batch = [0]
    handles: list[Any] = [
        model.register_forward_pre_hook(lambda _, args: batch.__setitem__(0, len(args[0])))
    ]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            handles.append(module.register_forward_pre_hook(partial(_one_row_each, batch)))
    hooks = []
    try:
        if model.prompt_PD is not None:
            model.prompt_PD.grad_sample = None  # type: ignore[attr-defined]
            handles.append(model.top.register_forward_pre_hook(partial(_watch_prompt, model)))
        # not on the whole: it would take a module with a bare parameter for one layer
        for part in (model.bottom, model.top):
            # lookups of frozen embeddings: the first layer's input has no gradient, its weights do
            hooks.append(GradSampleHooks(part, batch_first=True, loss_reduction="sum"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        for handle in handles:
            handle.remove()
        for hook in hooks:
            hook.cleanup()
        _clean(model)


def _one_row_each(batch: list[int], module: nn.Module, args: tuple[Tensor, ...]) -> Any:
    (ids_BT,) = args
    if ids_BT.ndim != 2 or len(ids_BT) not in (1, batch[0]):
        raise ValueError("dp-sgd: this model looks up embeddings in a way that is not supported")
    return (ids_BT.expand(batch[0], -1),)


def _watch_prompt(model: WholeModel, module: nn.Module, args: tuple[Any, ...]) -> None:
    hidden_BTD: Tensor = args[0]
    prompt = model.prompt_PD
    if prompt is None or not hidden_BTD.requires_grad:
        return
    first, last = model.prompt_place, model.prompt_place + len(prompt)

    def keep(grad_BTD: Tensor) -> None:
        prompt.grad_sample = grad_BTD[:, first:last].detach().clone()  # type: ignore[attr-defined]

    hidden_BTD.register_hook(keep)  # type: ignore[no-untyped-call]


def _clean(model: WholeModel) -> None:
    for parameter in model.parameters():
        parameter.grad = None
        for name in _ON_PARAMETERS:
            if hasattr(parameter, name):
                delattr(parameter, name)
    for module in model.modules():
        for name in _ON_MODULES:
            # not hasattr: a wrapper of peft's answers for the module in it
            vars(module).pop(name, None)
