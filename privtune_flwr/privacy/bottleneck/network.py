"""The task bottleneck as a network: tuned blocks, a few symbols a token, and a small read-out.

Our own design, not PrivTune's: what survives an attacker who knows everything is a release of low
rate that was learned for the task.

Legend: B sentences, T tokens, D hidden size, R numbers a token, C classes, L levels, P positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from privtune_flwr.models.bottom import BottomModel
from privtune_flwr.models.families import linear_names
from privtune_flwr.privacy.base import MechanismError
from privtune_flwr.privacy.bottleneck.recipe import Shape
from privtune_flwr.privacy.learning import State

HIDDEN = 128
_CONTEXT = 5


class Lift(nn.Module):
    """From symbols back to the model's hidden size: a linear map and a vector for each position.

    The cloud's front starts from it, see ``Bottleneck.lift_start``.
    """

    def __init__(self, width: int, hidden_size: int, positions: int) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(width, hidden_size) / math.sqrt(width))
        self.positions = nn.Parameter(torch.zeros(positions, hidden_size))

    def forward(self, symbols_BTR: Tensor) -> Tensor:
        """Give (B, T, D); positions past the table share its last vector."""
        number_T = torch.arange(symbols_BTR.shape[1]).clamp(max=len(self.positions) - 1)
        return symbols_BTR @ self.projection + self.positions[number_T]


class ReadOut(nn.Module):
    """Classes from lifted symbols: a non-linearity, the mean over tokens, a linear classifier.

    It stands for the cloud's top model while the channel is learned. What is shallow here pays:
    devices have few steps, and the blocks learn only as fast as the read-out lets them.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, lifted_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Give logits (B, C)."""
        mask_BT1 = mask_BT[..., None].to(lifted_BTD.dtype)
        pooled_BD = (functional.gelu(lifted_BTD) * mask_BT1).sum(1) / mask_BT1.sum(1)
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC


class TokenDecoder(nn.Module):
    """Guess tokens from symbols and their neighbours; the channel is trained to defeat it.

    Its outputs are compared with the model's own (frozen) word vectors of the tokens that occur in
    the batch: as good as the whole vocabulary for a training signal, and a hundred times cheaper.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.inward = nn.Conv1d(width, HIDDEN, _CONTEXT, padding=_CONTEXT // 2)
        self.outward = nn.Linear(HIDDEN, hidden_size)

    def forward(
        self, symbols_BTR: Tensor, ids_BT: Tensor, mask_BT: Tensor, words: Tensor
    ) -> Tensor:
        """Give the mean cross-entropy over real tokens, as a share of that of a blind guess."""
        known, target_N = torch.unique(ids_BT[mask_BT == 1], return_inverse=True)
        symbols_BRT = (symbols_BTR * mask_BT[..., None]).transpose(1, 2)
        hidden_BTH = functional.gelu(self.inward(symbols_BRT)).transpose(1, 2)
        guess_ND = self.outward(hidden_BTH[mask_BT == 1])
        vectors = functional.normalize(words[known], dim=1)
        loss = functional.cross_entropy(guess_ND @ vectors.T, target_N)
        return loss / math.log(max(2, len(known)))


class _Reverse(torch.autograd.Function):
    """The identity; its gradient comes back negated and weighted."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


class BottleneckNetwork(nn.Module):
    """The device's own copy of the bottom model's blocks, then R numbers a token.

    Parameters
    ----------
    bottom : BottomModel
        Copied, except its embeddings, which stay frozen and are shared.
    shape : Shape
        Sizes and noise.
    num_labels : int
        C; 0 leaves the read-out (and the adversary) out, as for a release.

    Raises
    ------
    MechanismError
        If the bottom model is not a real one: its blocks must be tunable.
    """

    def __init__(self, bottom: object, shape: Shape, num_labels: int = 0) -> None:
        super().__init__()
        if not isinstance(bottom, BottomModel):
            raise MechanismError("bottleneck: needs a BottomModel, whose blocks can be copied")
        self.shape = shape
        self.num_labels = num_labels
        self.base = _own_blocks(bottom, shape.lora_rank)
        self._padding_id = int(bottom.base.config.pad_token_id or 0)
        hidden_size = bottom.hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.projection = nn.Linear(hidden_size, shape.width)
        # Rows of norm sqrt(D) then give numbers of variance one: neither flat nor saturated.
        nn.init.normal_(self.projection.weight, std=1 / math.sqrt(hidden_size))
        nn.init.zeros_(self.projection.bias)
        self.lift = Lift(shape.width, hidden_size, shape.positions)
        self.readout = ReadOut(hidden_size, num_labels) if num_labels else None
        decoder = TokenDecoder(shape.width, hidden_size) if num_labels and shape.adversary else None
        self.adversary = decoder
        self.eval()  # for ever: the bottom model was cut without dropout

    def squash(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Give the numbers in [-1, 1] before they are quantised or noised, (B, T, R)."""
        ids_BT = ids_BT.masked_fill(mask_BT == 0, self._padding_id)
        hidden_BTD = self.base(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        squashed_BTR: Tensor = torch.tanh(self.projection(self.norm(hidden_BTD)))
        return squashed_BTR

    def symbols(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Give what a release would hold, with chance from torch's generator, differentiably."""
        squashed_BTR = self.squash(ids_BT, mask_BT)
        if self.shape.levels:
            return straight_through(squashed_BTR, self.shape.levels, self.shape.flip)
        return squashed_BTR + _dchi_like(squashed_BTR, self.shape.eta)

    def loss(self, ids_BT: Tensor, mask_BT: Tensor, labels_B: Tensor, adversary: float) -> Tensor:
        """Give what is minimised: the task, and against the channel the adversary's success."""
        assert self.readout is not None
        symbols_BTR = self.symbols(ids_BT, mask_BT)
        logits_BC = self.readout(self.lift(symbols_BTR), mask_BT)
        loss = functional.cross_entropy(logits_BC, labels_B)
        if self.adversary is not None:
            reversed_BTR = _Reverse.apply(symbols_BTR, adversary)  # type: ignore[no-untyped-call]
            words = self.base.get_input_embeddings().weight
            loss = loss + self.adversary(reversed_BTR, ids_BT, mask_BT, words)
        return loss

    def logits(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Give the local read-out's logits (B, C)."""
        assert self.readout is not None
        logits_BC: Tensor = self.readout(self.lift(self.symbols(ids_BT, mask_BT)), mask_BT)
        return logits_BC

    def learned(self) -> dict[str, nn.Parameter]:
        """Give all trainable parameters by name: what travels, sorted."""
        return {n: p for n, p in sorted(self.named_parameters()) if p.requires_grad}

    def state(self) -> State:
        """Copy the trainable parameters as float32 arrays."""
        return {n: p.detach().numpy().astype(np.float32) for n, p in self.learned().items()}

    def put(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put a state in.

        Raises
        ------
        MechanismError
            If names, shapes or types are not exactly those of this network, or a number is not
            finite; nothing is changed then.
        """
        own = self.learned()
        missing, unexpected = sorted(own.keys() - state), sorted(state.keys() - own)
        if missing or unexpected:
            raise MechanismError(
                f"bottleneck: state: missing {missing[:3]}, unexpected {unexpected[:3]}"
            )
        for name, parameter in own.items():
            array = state[name]
            if array.dtype != np.float32 or array.shape != tuple(parameter.shape):
                raise MechanismError(
                    f"bottleneck: state {name} must be float32 {tuple(parameter.shape)}"
                )
            if not np.isfinite(array).all():
                raise MechanismError(f"bottleneck: state {name} holds numbers that are not finite")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(torch.from_numpy(np.array(state[name])))


def straight_through(squashed: Tensor, levels: int, flip: float = 0.0) -> Tensor:
    """Round to the nearest of ``levels`` numbers from -1 to 1; the gradient passes unchanged.

    With ``flip`` each number is, with that probability, replaced by one of all levels at random.
    """
    top = levels - 1
    chosen = torch.round((squashed.detach() + 1) / 2 * top)
    if flip > 0:
        anything = torch.randint(levels, chosen.shape).to(chosen.dtype)
        chosen = torch.where(torch.rand(chosen.shape) < flip, anything, chosen)
    return squashed + (chosen * 2 / top - 1 - squashed.detach())


def _dchi_like(values: Tensor, eta: float) -> Tensor:
    """Draw d_chi noise from torch's generator, for training only; see ``privacy.dchi``."""
    direction = functional.normalize(torch.randn(values.shape), dim=-1)
    shape = torch.full((*values.shape[:-1], 1), float(values.shape[-1]))
    return direction * torch._standard_gamma(shape) / eta


def _own_blocks(bottom: BottomModel, lora_rank: int) -> Any:
    """Copy a base model so that its blocks can be tuned; all that stays frozen is shared."""
    blocks = bottom.family.block_list(bottom.base)
    tuned = set() if lora_rank else {id(t) for t in (*blocks.parameters(), *blocks.buffers())}
    everything = (*bottom.base.parameters(), *bottom.base.buffers())
    # What the memo holds is taken as its own copy: the large embedding table exists once.
    base = copy.deepcopy(bottom.base, {id(t): t for t in everything if id(t) not in tuned})
    if not lora_rank:
        bottom.family.block_list(base).requires_grad_(True)
        return base
    from peft import LoraConfig, inject_adapter_in_model

    targets = linear_names(base, bottom.family)
    if targets:  # none where the model is cut below its first block
        lora = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            lora_dropout=0.0,
            target_modules=targets,
            fan_in_fan_out=bottom.family.conv1d,
        )
        inject_adapter_in_model(lora, base)
    return base
