"""Getting the top model used to noise before it sees private text.

Public text goes the way that private text will go: bottom model, mechanism, wire, post-processing.
On the rows that come out the top model first learns

- ``distil``: to give the last hidden states that the uncut model has on the clean sentence;
- ``labels``: a public task with the same classes, by cross-entropy;
- ``reconstruct``: to tell the true tokens, with a head that is thrown away afterwards. Close to the
  token reconstruction of RAPT (Li et al., "Privacy-Preserving Prompt Tuning for Large Language
  Model Services", 2023), which trains it beside the task.

It uses public things alone, so it costs the devices no privacy. The adapted state is kept with the
public knowledge under the hash of all that determines it.

Legend: N rows, B sentences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from privtune_flwr.config import ConfigError, RunConfig
from privtune_flwr.data import load_public_labelled, tokenise
from privtune_flwr.data.snippets import SNIPPET_CLASSES
from privtune_flwr.models import CutModel, TopModel, load_top_state, parameter_groups, top_state
from privtune_flwr.training.batches import batch_order, collate
from privtune_flwr.training.objectives import Distil, Labels, Objective, Reconstruct
from privtune_flwr.training.store import Example, SmashedStore
from privtune_flwr.training.trainer import accuracy_and_loss, pick_device, schedule_factor

if TYPE_CHECKING:
    from privtune_flwr.cloud import CloudSide

logger = logging.getLogger("privtune.cloud")

_VERSION = 1  # raise it whenever the adapted state's definition changes
_CHUNK = 256
_KEY = b"the cloud's own public text".ljust(32)
_HELD_OUT = 400  # sentences at most that tell how well it went
_METRIC = "metric."


def adapt_top(cloud: CloudSide, model: CutModel) -> dict[str, float]:
    """Adapt a fresh top model in place, as ``recovery.adapt`` says.

    Parameters
    ----------
    cloud : CloudSide
        Mechanism, public text, post-processing and configuration.
    model : CutModel
        Its top is changed: with adapters and lift, where it has them.

    Returns
    -------
    dict
        Empty without ``recovery.adapt``. Else ``adapt_examples``, ``adapt_seconds``,
        ``adapt_loss_before`` and ``adapt_loss_after`` on public sentences held out, and for
        ``labels`` ``adapt_accuracy`` on them.

    Raises
    ------
    ConfigError
        If ``labels`` is asked for and the task's classes are not those of the public text.
    """
    config = cloud.config
    if config.recovery.adapt == "none":
        return {}
    sequences, labels = _material(cloud, model)

    def build() -> dict[str, NDArray[Any]]:
        metrics = _adapt(cloud, model, sequences, labels)
        state = {name: tensor.numpy() for name, tensor in top_state(model.top).items()}
        return state | {_METRIC + name: np.array(value) for name, value in metrics.items()}

    tables = cloud.public.cached("adapted", {"key": _key(cloud, model)}, build)
    metrics = {
        name.removeprefix(_METRIC): float(table)
        for name, table in tables.items()
        if name.startswith(_METRIC)
    }
    # Copies: what is cached is memory-mapped and read-only.
    load_top_state(
        model.top,
        {n: torch.tensor(np.array(t)) for n, t in tables.items() if not n.startswith(_METRIC)},
    )
    logger.info(
        "top model adapted to public releases (%s): loss %.4f, before %.4f",
        config.recovery.adapt,
        metrics["adapt_loss_after"],
        metrics["adapt_loss_before"],
    )
    return metrics


def public_reference(cloud: CloudSide, labels: Sequence[str]) -> dict[str, float]:
    """Measure what public labels alone reach under a mechanism: no private example is used.

    Parameters
    ----------
    cloud : CloudSide
        ``recovery.adapt`` is taken as ``labels``, with its epochs, examples and learning rate.
    labels : sequence of str
        The task's classes in order.

    Returns
    -------
    dict
        ``test_accuracy``, ``test_loss``, ``test_examples`` on the test set, sent as private
        queries are, and what :func:`adapt_top` measured.

    Raises
    ------
    ConfigError
        If there is no test set or the classes do not fit.
    """
    recovery = cloud.config.recovery.model_copy(update={"adapt": "labels"})
    public = dataclasses.replace(
        cloud, config=cloud.config.model_copy(update={"recovery": recovery})
    )
    _, trainer = public.build_top(labels)
    with tempfile.TemporaryDirectory() as folder:
        store = public.open_store(Path(folder))
        count = public.add_test_set(store, labels)
        if not count:
            raise ConfigError(
                "data.test-source = 'none' or data.test-examples = 0: a reference needs a test set"
            )
        examples = [e for key in sorted(c.key for c in store) for e in store.examples(key)]
        logits_BC = trainer.logits(store.training_rows(), examples)
    accuracy, loss = accuracy_and_loss(logits_BC, [e.label for e in examples])
    measured = {"test_accuracy": accuracy, "test_loss": loss, "test_examples": float(count)}
    return measured | public.adaptation


def _material(
    cloud: CloudSide, model: CutModel
) -> tuple[list[NDArray[np.int32]], list[int] | None]:
    """Draw the public sentences to adapt on, and their labels if they serve."""
    config, recovery = cloud.config, cloud.config.recovery
    rng = np.random.default_rng([config.run.seed, 4])
    if recovery.adapt != "labels":
        special = cloud.public.special_ids
        useful = [s for s in cloud.public.sequences if not np.isin(s, special).all()]
        chosen = rng.permutation(len(useful))[: recovery.adapt_examples]
        return [useful[int(i)] for i in chosen], None
    names = list(model.spec.labels)
    if sorted(names) != sorted(SNIPPET_CLASSES):
        raise ConfigError(
            f"recovery.adapt = 'labels': the public text is labelled {', '.join(SNIPPET_CLASSES)}, "
            f"the task has {', '.join(names)}; allowed here: none, distil, reconstruct"
        )
    labelled = load_public_labelled(config.data.public_corpora)
    chosen = rng.permutation(len(labelled.texts))[: recovery.adapt_examples]
    texts = [labelled.texts[int(i)] for i in chosen]
    position = [names.index(name) for name in SNIPPET_CLASSES]
    return (
        tokenise(cloud.bottom.tokenizer, texts, config.model.max_length),
        [position[labelled.labels[int(i)]] for i in chosen],
    )


def _key(cloud: CloudSide, model: CutModel) -> str:
    """Hash all that determines the adapted state, besides the public text."""
    config: RunConfig = cloud.config
    start = hashlib.sha256()
    for name, parameter in sorted(model.top.named_parameters()):
        start.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    parts = {
        "version": _VERSION,
        "spec": cloud.spec.id,
        "recovery": config.recovery.model_dump(),
        "model": config.model.model_dump(),
        "train": config.train.model_dump(
            include={"head_learning_rate", "batch_size", "weight_decay", "clip_norm"}
            | {"schedule", "warmup"}
        ),
        "decoder": config.privacy.decoder,
        "wire": config.privacy.wire,
        "public": config.data.public_text,
        "labels": list(model.spec.labels),
        "seed": config.run.seed,
        "start": start.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _adapt(
    cloud: CloudSide,
    model: CutModel,
    sequences: list[NDArray[np.int32]],
    labels: list[int] | None,
) -> dict[str, float]:
    started = time.perf_counter()
    config = cloud.config
    if len(sequences) < 2:
        raise ConfigError("recovery.adapt: there are not two public sentences to adapt on")
    held = min(_HELD_OUT, max(1, len(sequences) // 10))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logger.info("adapting the top model: %d public sentences are sent", len(sequences))
        store = cloud.open_store(folder)
        examples = _send(cloud, store, sequences, labels)
        device = pick_device(config.train.device)
        model.top.to(device)
        objective: Objective
        if config.recovery.adapt == "labels":
            objective = Labels(model.top)
        elif config.recovery.adapt == "distil":
            objective = Distil(model.top, cloud.bottom, sequences, examples, folder)
        else:
            objective = Reconstruct(model.top, cloud.public, sequences)
        test, rest = examples[:held], examples[held:]
        rows_ND = store.training_rows()
        before = _held_out_loss(objective, rows_ND, test, config.train.batch_size)
        _train(objective, model.top, rows_ND, rest, config)
        after = _held_out_loss(objective, rows_ND, test, config.train.batch_size)
        metrics = {"adapt_loss_before": before, "adapt_loss_after": after}
        if labels is not None:
            metrics["adapt_accuracy"] = _accuracy(model.top, rows_ND, test, config.train.batch_size)
        # Windows cannot remove a mapped file, and elsewhere the disk stays taken.
        del rows_ND, objective
    seconds = time.perf_counter() - started
    return metrics | {"adapt_examples": float(len(rest)), "adapt_seconds": seconds}


def _send(
    cloud: CloudSide,
    store: SmashedStore,
    sequences: list[NDArray[np.int32]],
    labels: list[int] | None,
) -> list[Example]:
    examples: list[Example] = []
    for chunk, start in enumerate(range(0, len(sequences), _CHUNK)):
        part = sequences[start : start + _CHUNK]
        rows_ND, lengths = cloud.release(part, _KEY, start)
        key = ("public", "train", 0, chunk)
        store.append(
            key, rows_ND, lengths, None if labels is None else labels[start : start + _CHUNK]
        )
        examples += store.examples(key)
    return examples


def _train(
    objective: Objective,
    top: TopModel,
    rows_ND: NDArray[Any],
    examples: Sequence[Example],
    config: RunConfig,
) -> None:
    recovery, train = config.recovery, config.train
    groups = parameter_groups(
        top,
        lr=recovery.adapt_learning_rate,
        head_lr=train.head_learning_rate,
        weight_decay=train.weight_decay,
    )
    own = list(objective.parameters())
    if own:
        groups.append({"params": own, "lr": train.head_learning_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    rates = [float(group["lr"]) for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    lengths = [e.length for e in examples]
    total = recovery.adapt_epochs * -(-len(examples) // train.batch_size)
    every = max(1, total // 10)
    step, losses = 0, 0.0
    top.train()
    for epoch in range(recovery.adapt_epochs):
        for batch in batch_order(lengths, train.batch_size, [config.run.seed, 5, epoch]):
            factor = schedule_factor(step, total, train)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = _loss(objective, rows_ND, [examples[i] for i in batch])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
            optimizer.step()
            step, losses = step + 1, losses + float(loss.detach())
            if step % every == 0:
                mean = losses / every
                logger.info(
                    "adapting (%s): step %d/%d, loss %.4f", recovery.adapt, step, total, mean
                )
                losses = 0.0
    optimizer.zero_grad(set_to_none=True)


def _loss(objective: Objective, rows_ND: NDArray[Any], batch: Sequence[Example]) -> torch.Tensor:
    device = objective.device
    hidden_BTD, mask_BT, _ = (t.to(device) for t in collate(rows_ND, batch))
    return objective.loss(hidden_BTD, mask_BT, batch)


@torch.no_grad()
def _held_out_loss(
    objective: Objective, rows_ND: NDArray[Any], examples: Sequence[Example], size: int
) -> float:
    total = 0.0
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        total += float(_loss(objective, rows_ND, part)) * len(part)
    return total / len(examples)


@torch.no_grad()
def _accuracy(
    top: TopModel, rows_ND: NDArray[Any], examples: Sequence[Example], size: int
) -> float:
    device = next(top.parameters()).device
    right = 0
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        hidden_BTD, mask_BT, labels_B = (t.to(device) for t in collate(rows_ND, part))
        right += int((top(hidden_BTD, mask_BT).argmax(1) == labels_B).sum())
    return right / len(examples)
