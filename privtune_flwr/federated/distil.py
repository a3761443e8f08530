"""Federated distillation: devices share what they think of public sentences, never weights.

Each device has a model of its own and answers with its logits on a public, unlabelled set; the
cloud pools the answers into a teacher, which devices and the cloud's own model are distilled
towards. What crosses the network is N x C numbers each way, whatever the size of the model.

Sources: FedMD, arXiv 1910.03581 (devices distil towards the mean before they train on their own
text); FedDF, arXiv 2006.07242 (the cloud distils a model of its own from the ensemble on unlabelled
text of another domain); Hinton et al., arXiv 1503.02531 (temperature, and its square before the
loss). That the two are one protocol here is KD-FedLLM's setting, a *reconstruction*: its text is
not at hand.

How much the domain of the public text matters is not measured by a study here.

Legend: B sentences in a batch, N public sentences, C classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from privtune_flwr.bundle import Manifest
from privtune_flwr.cloud import cloud_cache
from privtune_flwr.config import ConfigError, RunConfig
from privtune_flwr.data import load_public_text, tokenise
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.local import local_steps, make_optimizer
from privtune_flwr.federated.methods import FitMethod, Outcome, Schema, Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.weights import WeightsMethod
from privtune_flwr.federated.whole import WholeModel, load_whole, pad
from privtune_flwr.models import BottomModel, load_tokenizer
from privtune_flwr.privacy.learning import State
from privtune_flwr.training.batches import batch_order
from privtune_flwr.training.trainer import span_factors

PUBLIC_FILE = "public.safetensors"
#: What the cloud sends: the pooled logits (N, C), or in place of them that there are none yet.
TEACHER, NO_TEACHER = "teacher", "no-teacher"
LOGITS = "logits"
#: No device's vote, and so no teacher, is beyond it.
MAX_VOTE = 20.0
# its draw is not that of splits, test set or devices
_PUBLIC_DRAW = 5


# --------------------------------------------------------------------------------- public text


def public_bundle(config: RunConfig, model_folder: Path) -> tuple[Manifest, Path]:
    """Draw the public sentences and bundle their token ids; text and labels stay out.

    Parameters
    ----------
    config : RunConfig
        ``federated.public-examples`` of ``data.public-text``, drawn by ``run.seed``.
    model_folder : Path
        The whole model's bundle, for its tokenizer.

    Returns
    -------
    Manifest, Path
        Of one file: ``ids`` int32 (sum of lengths,) and ``lengths`` int32 (N,).

    Raises
    ------
    ConfigError
        If there are not that many sentences.
    """
    texts = load_public_text(config.data.public_corpora)
    wanted = config.federated.public_examples
    if wanted > len(texts):
        raise ConfigError(
            f"federated.public-examples = {wanted}: data.public-text has {len(texts)} sentences"
        )
    rng = np.random.default_rng([config.run.seed, _PUBLIC_DRAW])
    drawn = [texts[i] for i in rng.choice(len(texts), size=wanted, replace=False)]
    ids = tokenise(load_tokenizer(model_folder), drawn, config.model.max_length)
    arrays = {
        "ids": np.concatenate(ids).astype(np.int32),
        "lengths": np.array([len(i) for i in ids], dtype=np.int32),
    }
    cache = cloud_cache()
    with tempfile.TemporaryDirectory(dir=cache.root) as folder:
        save_file(arrays, Path(folder) / PUBLIC_FILE)
        manifest = cache.add_folder(Path(folder))
    return manifest, cache.path(manifest.id)


def read_public(
    folder: Path | None, settings: FitSettings, bottom: BottomModel
) -> list[NDArray[np.int32]]:
    """Read the public sentences: token ids (T,) each. To a device they are the cloud's word.

    Raises
    ------
    Refusal
        If they are not there, not as many as the settings say, or no sentences of this model.
    """
    if folder is None:
        raise Refusal("request.public_id: distillation needs public sentences")
    try:
        with safe_open(folder / PUBLIC_FILE, framework="numpy") as file:
            names = set(file.keys())
            _hold(names == {"ids", "lengths"}, "its arrays are not ids and lengths")
            for name in sorted(names):
                part = file.get_slice(name)
                right = part.get_dtype() == "I32" and len(part.get_shape()) == 1
                _hold(right, f"{name} must be int32 with one axis")
            ids, lengths_N = file.get_tensor("ids"), file.get_tensor("lengths")
    except (OSError, SafetensorError):
        raise Refusal(f"request.public_id: {PUBLIC_FILE} cannot be read") from None
    wanted = settings.federated.public_examples
    _hold(len(lengths_N) == wanted, f"{len(lengths_N)} sentences, settings say {wanted}")
    longest = min(settings.model.max_length, bottom.max_positions or settings.model.max_length)
    _hold(
        int(lengths_N.min()) >= 1 and int(lengths_N.max()) <= longest,
        f"a length is not between 1 and {longest}",
    )
    _hold(int(lengths_N.sum(dtype=np.int64)) == len(ids), "lengths do not add up to the ids")
    _hold(
        int(ids.min()) >= 0 and int(ids.max()) < bottom.vocab_size,
        f"an id is not in the vocabulary of {bottom.vocab_size}",
    )
    return np.split(ids, np.cumsum(lengths_N)[:-1])


def _hold(condition: bool, reason: str) -> None:
    if not condition:
        raise Refusal(f"request.public_id: {reason}")


# -------------------------------------------------------------------------------- distillation


def vote_of(logits_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Turn one device's logits into its vote: centred over classes, then cut at +-20.

    Centring changes no probability. The bound is far beyond what a trained classifier says, and
    leaves a device that answers with 1e38 no more than its weight.
    """
    wide_NC = logits_NC.astype(np.float64)
    wide_NC -= wide_NC.mean(axis=1, keepdims=True)
    return np.clip(wide_NC, -MAX_VOTE, MAX_VOTE).astype(np.float32)


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Give T^2 KL(teacher || student) of logits at temperature T, as mean over a batch.

    Softening divides gradients by T twice; the square makes up for it, so that the rate that
    suits one temperature suits another (arXiv 1503.02531).
    """
    divergence = nn.functional.kl_div(
        nn.functional.log_softmax(student_BC / temperature, dim=1),
        nn.functional.log_softmax(teacher_BC / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * divergence


def distil(
    model: WholeModel,
    sequences: Sequence[NDArray[np.int32]],
    teacher_NC: NDArray[np.float32],
    *,
    seed: int,
    progress: tuple[float, float] = (0.0, 1.0),
) -> tuple[int, float]:
    """Train a model towards a teacher's logits on sentences without labels, in place.

    Parameters
    ----------
    model : WholeModel
        Its settings say optimiser, rates, temperature and passes (``federated.distil-epochs``).
    sequences : sequence of int arrays (T,)
        N sentences.
    teacher_NC : float32 array (N, C)
        Logits, in the sentences' order.
    seed : int
        Of the order of batches.
    progress : (float, float)
        Part of the run's schedule, as :func:`~.local.train_locally` takes it.

    Returns
    -------
    steps, loss : int, float
        Optimiser steps, and the mean loss as it was trained on.
    """
    config, federated = model.settings.train, model.settings.federated
    optimizer = make_optimizer(model)
    base = [float(group["lr"]) for group in optimizer.param_groups]
    trained = list(model.trainable().values())
    device = trained[0].device
    total = local_steps(len(sequences), config.batch_size, federated.distil_epochs)
    factors = span_factors(total, progress, config)
    lengths = [len(s) for s in sequences]
    loss_sum, step = 0.0, 0
    model.train()
    for epoch in range(federated.distil_epochs):
        for batch in batch_order(lengths, config.batch_size, [seed, 1, epoch]):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * factors[step]
            ids_BT, mask_BT = (t.to(device) for t in pad([sequences[i] for i in batch]))
            wanted_BC = torch.from_numpy(teacher_NC[batch]).to(device)
            loss = distillation_loss(model(ids_BT, mask_BT), wanted_BC, federated.temperature)
            loss_sum += float(loss.detach()) * len(batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
            optimizer.step()
            step += 1
    return step, loss_sum / (len(sequences) * federated.distil_epochs)


# ---------------------------------------------------------------------------------- the device


class DistilMethod(FitMethod):
    """A device with a model of its own: distil, train on its text, say its logits.

    What it trains (adapters and head, or all weights) stays on its disk between rounds. A device
    that was not there before starts from the pretrained model, distilled towards the teacher.
    """

    remembers: ClassVar[bool] = True

    def fit(self, state: State, work: Work) -> Outcome:
        """Work one round; only logits on the public sentences leave."""
        model = self.model
        public = read_public(work.public, self.settings, model.bottom)
        teacher_NC = self._teacher(state)
        model.load(work.memory or _first_state(self.folder, self.settings, self.labels))
        steps = 0
        if teacher_NC is not None:
            span = ((work.round - 1) / work.rounds, work.round / work.rounds)
            steps, _ = distil(model, public, teacher_NC, seed=work.seed, progress=span)
        own = WeightsMethod(self.settings, self.folder, self.labels).fit(model.state(), work)
        metrics = {**own.metrics, "steps": own.metrics["steps"] + steps}
        return Outcome({LOGITS: model.logits(public)}, metrics, own.arrays)

    def reply_schema(self, state: State, public: Path | None = None) -> Schema:
        """Promise one array of logits, whatever came."""
        return {LOGITS: ("float32", self._shape)}

    @property
    def _shape(self) -> tuple[int, int]:
        return self.settings.federated.public_examples, len(self.labels)

    def _teacher(self, state: State) -> NDArray[np.float32] | None:
        """Hold what the cloud sent to the protocol; None where there is no teacher yet."""
        if set(state) == {NO_TEACHER}:
            return None
        if set(state) != {TEACHER}:
            raise Refusal(f"request.state: must be {TEACHER} or {NO_TEACHER}")
        teacher_NC = state[TEACHER]
        if teacher_NC.shape != self._shape:
            raise Refusal(f"request.{TEACHER}: shape {teacher_NC.shape}, must be {self._shape}")
        if not bool((np.abs(teacher_NC) <= MAX_VOTE * (1 + 1e-6)).all()):
            raise Refusal(f"request.{TEACHER}: beyond {MAX_VOTE:g}, or not a number")
        return teacher_NC


@lru_cache(maxsize=1)
def _first_state(folder: Path, settings: FitSettings, labels: tuple[str, ...]) -> State:
    """Give what a device trains as it is before any training; a cache, for the process."""
    return load_whole(folder, settings, labels).state()
