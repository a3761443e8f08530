"""Uncut fine-tuning in one process: what a federation is held against."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from privtune_flwr.config import RunConfig
from privtune_flwr.data import tokenise
from privtune_flwr.training.batches import batch_order
from privtune_flwr.training.trainer import schedule_factor


@dataclass(frozen=True)
class Pass:
    """One pass over text: ``number`` keys the order of its batches as a round's does."""

    number: int
    texts: Sequence[str]
    labels: Sequence[int]


@dataclass(frozen=True)
class CentralRun:
    """Losses of all steps and the seconds that training took."""

    losses: list[float]
    seconds: float


def train_uncut(
    model: Any, tokenizer: Any, passes: Sequence[Pass], config: RunConfig, *, head: str
) -> CentralRun:
    """Fine-tune a Hugging Face classifier as the cloud trains its top model.

    Parameters
    ----------
    model : PreTrainedModel or MeanPooledClassifier
        What does not require a gradient stays frozen.
    tokenizer : PreTrainedTokenizerBase
    passes : sequence of Pass
        All passes in order.
    config : RunConfig
        Batch size, optimiser and schedule are those of ``train``, lengths those of ``model``.
    head : str
        Prefix of the parameters that take the head's learning rate.
    """
    train = config.train
    optimizer = torch.optim.AdamW(_groups(model, config, head))
    base = [group["lr"] for group in optimizer.param_groups]
    total = sum(-(-len(p.texts) // train.batch_size) for p in passes)
    start = time.perf_counter()
    losses: list[float] = []
    model.train()
    for current in passes:
        ids = tokenise(tokenizer, current.texts, config.model.max_length)
        order = batch_order(
            [len(i) for i in ids], train.batch_size, [config.run.seed, 2, current.number]
        )
        for batch in order:
            factor = schedule_factor(len(losses), total, train)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factor
            logits = _logits(model, tokenizer, [ids[i] for i in batch])
            target = torch.tensor([current.labels[i] for i in batch])
            loss = torch.nn.functional.cross_entropy(logits, target)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(
                [p for g in optimizer.param_groups for p in g["params"]], train.clip_norm
            )
            optimizer.step()
            losses.append(float(loss.detach()))
    return CentralRun(losses, time.perf_counter() - start)


@torch.inference_mode()
def accuracy(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[int], max_length: int
) -> float:
    """Share of texts that the model classifies right."""
    model.eval()
    ids = tokenise(tokenizer, texts, max_length)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    right = 0
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        guess = _logits(model, tokenizer, [ids[i] for i in part]).argmax(1)
        right += int((guess == torch.tensor([labels[i] for i in part])).sum())
    return right / len(ids)


def _logits(model: Any, tokenizer: Any, ids: Sequence[np.ndarray[Any, Any]]) -> torch.Tensor:
    padded = tokenizer.pad({"input_ids": [i.tolist() for i in ids]}, return_tensors="pt")
    output = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    # a mean-pooled classifier answers with the logits themselves
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _groups(model: Any, config: RunConfig, head: str) -> list[dict[str, Any]]:
    train = config.train
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = []
    for is_head, rate in ((False, train.learning_rate), (True, train.head_learning_rate)):
        for matrix, decay in ((True, train.weight_decay), (False, 0.0)):
            chosen = [
                p for n, p in named if n.startswith(head) == is_head and (p.ndim > 1) == matrix
            ]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return groups
