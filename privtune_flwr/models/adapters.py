"""LoRA on a top model, and the groups of parameters that an optimiser trains."""

from __future__ import annotations

from typing import Any

import torch

from privtune_flwr.config import ModelConfig
from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import last_parts, linear_names
from privtune_flwr.models.top import TopModel


def apply_lora(top: TopModel, config: ModelConfig) -> None:
    """Freeze a top model but for its head and low-rank adapters in its blocks, in place.

    Parameters
    ----------
    top : TopModel
        The model; its seed also seeds the adapters, and the global generator is left alone.
    config : ModelConfig
        ``lora_rank``, ``lora_alpha`` and ``lora_targets``: ``auto`` for the family's own, or
        names of linear layers joined by commas (``query`` or ``attention.output.dense``).

    Raises
    ------
    ModelError
        If a target names no linear layer of a block, or the model has adapters already.

    References
    ----------
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if top.adapted:
        raise ModelError("this top model has LoRA adapters already")
    network = top.network
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=_find_targets(top, config.lora_targets),
        modules_to_save=list(top.fresh_modules),
        fan_in_fan_out=top.family.conv1d,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(top.seed)
        top.model = get_peft_model(network, lora)
    top.adapted = True


def _find_targets(top: TopModel, wanted: str) -> list[str]:
    """Expand names to full paths, so that a name never reaches beyond the blocks."""
    prefix = "base" if top.head == "mean" else top.family.base
    linear = linear_names(top.network.base_model, top.family)
    names = [part.strip() for part in wanted.split(",") if part.strip()]
    if names == ["auto"]:
        names = list(top.family.lora_targets)
    found: list[str] = []
    for name in names:
        matches = [path for path in linear if path.endswith(f".{name}")]
        if not matches:
            raise ModelError(
                f"model.lora-targets: no linear layer is called {name!r}; "
                f"allowed: auto, or any of {', '.join(last_parts(linear))}"
            )
        found += [f"{prefix}.{path}" for path in matches]
    if not found:
        raise ModelError(
            f"model.lora-targets = {wanted!r}: allowed: auto, "
            f"or any of {', '.join(last_parts(linear))}"
        )
    return sorted(set(found))


def parameter_groups(
    top: TopModel, *, lr: float, head_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters for an optimiser.

    Parameters
    ----------
    top : TopModel
        The model, with or without adapters.
    lr : float
        Learning rate of pretrained parts (blocks, final norm, a pretrained pooler) and adapters.
    head_lr : float
        Learning rate of the head and of whatever else the checkpoint did not hold.
    weight_decay : float
        Weight decay of matrices; biases and norms have none.

    Returns
    -------
    list[dict[str, Any]]
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``; none of them empty.
    """
    network = top.network
    new = {id(p) for name in top.fresh_modules for p in network.get_submodule(name).parameters()}
    if top.lift is not None:
        new |= {id(p) for p in top.lift.parameters()}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in top.parameters():
        if not parameter.requires_grad:
            continue
        part, rate = ("head", head_lr) if id(parameter) in new else ("blocks", lr)
        # Biases and the weights of norms are the parameters with one dimension.
        decay = weight_decay if parameter.ndim > 1 else 0.0
        name = f"{part}-{'decay' if parameter.ndim > 1 else 'no-decay'}"
        group = groups.setdefault(
            name, {"name": name, "params": [], "lr": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
    return list(groups.values())
