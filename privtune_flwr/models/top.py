"""The top model: the remaining blocks and the head, trained in the cloud.

Legend: B sentences in a batch, T tokens, D hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import Family
from privtune_flwr.models.lift import Lift


class PassThrough(nn.Module):
    """Stands where the embeddings were: hidden states come in as ``inputs_embeds``."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, *_: Any, **__: Any) -> Any:
        """Give ``inputs_embeds`` back; ids, types and positions were used below the cut."""
        return inputs_embeds


class NoPositions(nn.Module):
    """Stands where a position table was: the bottom model has added positions already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Give a zero without dimensions, which changes neither values nor dtype."""
        return torch.zeros((), device=position_ids.device)


class TopModel(nn.Module):
    """A Hugging Face classification model whose lower part was taken off.

    It holds no parameter of the bottom part. Attention masks, blocks and heads are Hugging
    Face's own.

    Parameters
    ----------
    network : Any
        The classification model with all its blocks, or a
        :class:`~.heads.MeanPooledClassifier`; changed in place.
    family : Family
        Where its parts are.
    cut : int
        Blocks that are taken off.
    head : {"native", "mean"}
        Which head the network has.
    fresh_modules : tuple[str, ...]
        Modules of ``network`` to train like a new head: the head itself, and a pooler that the
        checkpoint did not hold.
    seed : int
        Seed of what is initialised later (adapters).
    """

    def __init__(
        self,
        network: Any,
        family: Family,
        *,
        cut: int,
        head: Literal["native", "mean"],
        fresh_modules: tuple[str, ...],
        seed: int,
    ) -> None:
        super().__init__()
        self.family = family
        self.cut = cut
        self.head = head
        self.fresh_modules = fresh_modules
        self.seed = seed
        self.adapted = False
        #: Front for rows that are not as wide as the model; see :mod:`.lift`.
        self.lift: Lift | None = None
        self.model = network
        base = network.base_model
        blocks = family.block_list(base)
        family.keep_blocks(base.config, cut, len(blocks))
        base.set_submodule(family.blocks, nn.ModuleList(blocks[cut:]))
        base.set_submodule(family.embeddings, PassThrough())
        if family.position_table:
            base.set_submodule(family.position_table, NoPositions())

    @property
    def network(self) -> Any:
        """The classification model itself, whether or not PEFT wraps it."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def hidden_size(self) -> int:
        """Hidden size D."""
        return int(self.network.config.hidden_size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the cloud."""
        return len(self.family.block_list(self.network.base_model))

    def forward(
        self,
        hidden_BTD: Tensor,
        attention_mask_BT: Tensor,
        pooled_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Classify representations.

        Parameters
        ----------
        hidden_BTD : Tensor
            Smashed data, right-padded, shape (B, T, D), or (B, T, R) with a lift; values at
            padding do not matter.
        attention_mask_BT : Tensor
            One for real tokens, zero for padding, shape (B, T).
        pooled_mask_BT : Tensor, optional
            One for tokens that the ``mean`` head averages; all real ones by default. Other heads
            average nothing.

        Returns
        -------
        Tensor
            logits_BC.
        """
        mask_BT = attention_mask_BT.long()
        inputs_BTD = self._inputs(hidden_BTD, mask_BT)
        network = self.network
        logits_BC: Tensor
        if self.head == "mean":
            logits_BC = network(
                inputs_embeds=inputs_BTD, attention_mask=mask_BT, pooled_mask=pooled_mask_BT
            )
        elif self.family.kind == "encoder":
            logits_BC = network(inputs_embeds=inputs_BTD, attention_mask=mask_BT).logits
        else:
            # Hugging Face finds the last token by looking for padding ids, and there are no ids
            # above the cut: the mask says where it is.
            output = network.base_model(inputs_embeds=inputs_BTD, attention_mask=mask_BT)
            last_B = (mask_BT.sum(1) - 1).clamp(min=0)
            rows_B = torch.arange(len(last_B), device=last_B.device)
            logits_BC = network.score(output.last_hidden_state[rows_B, last_B])
        return logits_BC

    def last_hidden(self, hidden_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Give the states that the head sees, (B, T, D); rows at padding are meaningless."""
        mask_BT = attention_mask_BT.long()
        states_BTD: Tensor = self.network.base_model(
            inputs_embeds=self._inputs(hidden_BTD, mask_BT), attention_mask=mask_BT
        ).last_hidden_state
        return states_BTD

    def _inputs(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        if self.lift is not None:
            lifted_BTD: Tensor = self.lift(hidden_BTD, mask_BT)
            return lifted_BTD
        # Masked attention multiplies padding by zero, which does not undo an infinity.
        return hidden_BTD.float().masked_fill(mask_BT.unsqueeze(-1) == 0, 0.0)


def top_state(top: TopModel) -> dict[str, Tensor]:
    """Copy what training changes, for a checkpoint.

    Returns
    -------
    dict[str, Tensor]
        Trainable parameters by name, on the CPU. Blocks are numbered from the cut. Everything
        else is a constant that :func:`~.cut.cut_model` and :func:`~.adapters.apply_lora` restore
        from the source and the seed.
    """
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in top.named_parameters()
        if parameter.requires_grad
    }


def load_top_state(top: TopModel, state: Mapping[str, Tensor]) -> None:
    """Put a state from :func:`top_state` back, in place.

    Raises
    ------
    ModelError
        If the names or shapes are not exactly those of the trainable parameters; nothing is
        changed then.
    """
    own = {name: p for name, p in top.named_parameters() if p.requires_grad}
    missing, unexpected = sorted(own.keys() - state), sorted(state.keys() - own)
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if missing or unexpected or wrong:
        raise ModelError(
            f"this state belongs to another top model: missing {missing[:3]}, "
            f"unexpected {unexpected[:3]}, of wrong shape {wrong[:3]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
