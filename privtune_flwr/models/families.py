"""Where each family of Hugging Face models keeps the parts that cutting needs.

A family is a table of names, nothing more: every path is relative to the *base model* (the one
that ``AutoModel`` returns), except ``base`` and ``heads``, which are relative to the
sequence-classification model around it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from privtune_flwr.models.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One layout of modules, shared by one or more ``model_type``.

    Attributes
    ----------
    name : str
        The family's name in messages.
    model_types : tuple[str, ...]
        Values of ``config.model_type`` with this layout.
    base : str
        Attribute of the classification model that holds the base model.
    embeddings : str
        Module that turns token ids into vectors (with positions, where they live inside it).
    blocks : str
        The ``ModuleList`` of blocks.
    depth_key : str
        Key of the configuration that counts the blocks.
    heads : tuple[str, ...]
        Modules of the classification model that are initialised afresh for a new task.
    lora_targets : tuple[str, ...]
        Linear layers of a block that LoRA adapts unless told otherwise (PEFT's own defaults).
    dropout_keys : tuple[str, ...]
        Keys of the configuration that hold a dropout probability used by the classifier.
    kind : {"encoder", "decoder"}
        An encoder classifies from its first token, a decoder from its last.
    final_norm : str
        Norm after the last block, empty if there is none. Belongs to the top model.
    position_table : str
        Separate table of absolute positions that the base model adds itself, empty if none.
    positions : {"absolute", "after-padding", "rotary"}
        ``after-padding`` is RoBERTa's: positions start at ``pad_token_id + 1``.
    pooler : bool
        Whether the classification model has a pretrained pooler between blocks and head.
    pooler_option : bool
        Whether the base model's class takes ``add_pooling_layer``.
    conv1d : bool
        Whether linear layers are ``Conv1D`` (weights transposed), as in GPT-2.
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    embeddings: str
    blocks: str
    depth_key: str
    heads: tuple[str, ...]
    lora_targets: tuple[str, ...]
    dropout_keys: tuple[str, ...]
    kind: Literal["encoder", "decoder"]
    final_norm: str = ""
    position_table: str = ""
    positions: Literal["absolute", "after-padding", "rotary"] = "absolute"
    pooler: bool = False
    pooler_option: bool = False
    conv1d: bool = False

    def depth(self, config: Any) -> int:
        """Count the blocks of a configuration."""
        return int(getattr(config, self.depth_key))

    def keep_blocks(self, config: Any, start: int, stop: int) -> None:
        """Make ``config`` describe blocks ``start`` to ``stop - 1`` only, in place."""
        setattr(config, self.depth_key, stop - start)
        # Models that mix full and sliding attention look each block's kind up by its index.
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types[start:stop])

    def max_positions(self, config: Any) -> int | None:
        """Longest sequence that the position table can number; None without a table."""
        if self.positions == "rotary":
            return None
        table = int(config.max_position_embeddings)
        return table - config.pad_token_id - 1 if self.positions == "after-padding" else table

    def block_list(self, base_model: nn.Module) -> nn.ModuleList:
        """Give the list of blocks of a base model."""
        blocks = base_model.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise ModelError(f"{self.name}: {self.blocks} is no list of blocks in this model")
        return blocks


_BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")

FAMILIES = (
    Family(
        name="BERT",
        model_types=("bert",),
        base="bert",
        embeddings="embeddings",
        blocks="encoder.layer",
        depth_key="num_hidden_layers",
        heads=("classifier",),
        lora_targets=("query", "value"),
        dropout_keys=_BERT_DROPOUT,
        kind="encoder",
        pooler=True,
        pooler_option=True,
    ),
    Family(
        name="RoBERTa",
        model_types=("roberta", "xlm-roberta"),
        base="roberta",
        embeddings="embeddings",
        blocks="encoder.layer",
        depth_key="num_hidden_layers",
        heads=("classifier",),
        lora_targets=("query", "value"),
        dropout_keys=_BERT_DROPOUT,
        kind="encoder",
        positions="after-padding",
        pooler_option=True,
    ),
    Family(
        name="DistilBERT",
        model_types=("distilbert",),
        base="distilbert",
        embeddings="embeddings",
        blocks="transformer.layer",
        depth_key="n_layers",
        heads=("pre_classifier", "classifier"),
        lora_targets=("q_lin", "v_lin"),
        dropout_keys=("dropout", "attention_dropout", "seq_classif_dropout"),
        kind="encoder",
    ),
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        base="transformer",
        embeddings="wte",
        blocks="h",
        depth_key="n_layer",
        heads=("score",),
        lora_targets=("c_attn",),
        dropout_keys=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        kind="decoder",
        final_norm="ln_f",
        position_table="wpe",
        conv1d=True,
    ),
    Family(
        name="Llama",
        model_types=("llama", "qwen2", "qwen3", "mistral"),
        base="model",
        embeddings="embed_tokens",
        blocks="layers",
        depth_key="num_hidden_layers",
        heads=("score",),
        lora_targets=("q_proj", "v_proj"),
        dropout_keys=("attention_dropout",),
        kind="decoder",
        final_norm="norm",
        positions="rotary",
    ),
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def supported_types() -> tuple[str, ...]:
    """Name every supported ``model_type``."""
    return tuple(_BY_TYPE)


def family_of(config: Any) -> Family:
    """Find the family of a Hugging Face configuration.

    Raises
    ------
    ModelError
        If its ``model_type`` is not supported; the message names those that are.
    """
    model_type = getattr(config, "model_type", None)
    family = _BY_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"model type {model_type!r} cannot be cut; supported: {', '.join(supported_types())}"
        )
    return family


def linear_names(base_model: nn.Module, family: Family) -> list[str]:
    """List the linear layers inside the blocks, as paths from the base model."""
    return [
        f"{family.blocks}.{name}"
        for name, module in family.block_list(base_model).named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]


def last_parts(names: Iterable[str]) -> list[str]:
    """Reduce module paths to their distinct last parts, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})
