"""The ``mean`` head: average the real tokens, then one linear layer; no pooler.

Legend: B sentences in a batch, T tokens, D hidden size, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from privtune_flwr.models.errors import ModelError
from privtune_flwr.models.families import Family, family_of

HEAD_FILE = "head.safetensors"


def pooler_options(family: Family) -> dict[str, Any]:
    """Options that keep an unused, randomly initialised pooler out of a base model."""
    return {"add_pooling_layer": False} if family.pooler_option else {}


class MeanPooledClassifier(nn.Module):
    """A base model, the mean over its real tokens, and a linear classifier.

    Parameters
    ----------
    base : nn.Module
        A Hugging Face base model, without pooler.
    num_labels : int
        Number of classes C.
    seed : int
        Seed of the classifier's weights; the global generator is left alone.
    """

    def __init__(self, base: Any, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        self.base = base
        self.config = base.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = nn.Linear(int(base.config.hidden_size), num_labels)
            nn.init.normal_(
                self.classifier.weight, std=float(getattr(base.config, "initializer_range", 0.02))
            )
        nn.init.zeros_(self.classifier.bias)

    @property
    def base_model(self) -> Any:
        """The Hugging Face base model, under the name that Hugging Face models use."""
        return self.base

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pooled_mask: Tensor | None = None,
    ) -> Tensor:
        """Classify a padded batch.

        Parameters
        ----------
        input_ids, inputs_embeds : Tensor | None
            Token ids (B, T) or vectors (B, T, D): one of them.
        attention_mask : Tensor | None
            (B, T), one for real tokens; all are real if None.
        pooled_mask : Tensor | None
            (B, T), one for tokens that are averaged; all real ones if None.

        Returns
        -------
        Tensor
            logits_BC.
        """
        hidden_BTD = self.base(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
        ).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(hidden_BTD.shape[:2], device=hidden_BTD.device)
        averaged_BT = attention_mask if pooled_mask is None else pooled_mask
        logits_BC: Tensor = self.classifier(mean_pool(hidden_BTD, averaged_BT))
        return logits_BC


def mean_pool(hidden_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Average the vectors of real tokens: (B, T, D) and (B, T) to (B, D)."""
    weight_BT1 = attention_mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
    # A sentence without tokens gives zeros, not a division by zero.
    return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1.0)


def load_mean_pooled(folder: Path | str) -> MeanPooledClassifier:
    """Load what :func:`~.export.export` saved for ``head = "mean"``.

    Parameters
    ----------
    folder : Path | str
        A folder with a Hugging Face base model and ``head.safetensors``.

    Returns
    -------
    MeanPooledClassifier
        In evaluation mode; call it with ``input_ids`` and ``attention_mask``.

    Raises
    ------
    ModelError
        If the folder holds no such model.
    """
    from transformers import AutoConfig, AutoModel

    folder = Path(folder)
    try:
        head = load_file(folder / HEAD_FILE)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        base = AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            **pooler_options(family_of(config)),
        )
        model = MeanPooledClassifier(base, num_labels=head["weight"].shape[0])
        model.classifier.load_state_dict(head)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no model with a mean head: {error}") from error
    return model.eval()
