"""Black-box prompt tuning on devices: the model runs forward, and only losses leave.

Sun et al. (BBT, arXiv 2201.03514) search a few numbers ``z`` without a gradient; a fixed random
projection makes a soft prompt of them. In Fed-BBPT's setting (arXiv 2310.03123) many devices say
how good a prompt is on text that stays with them. *Reconstruction*: what follows is built from what
these methods are, not from their code. It differs from them so:

- The cloud searches, not the devices: each generation it sends all candidates to all devices and
  averages their losses. Fed-BBPT's devices search on their own and the cloud averages prompts.
- There is no masked-language head that could name a class. The head is fixed: the mean state of a
  text is compared by cosine with that of a sentence that names each class. Scale and one bias a
  class are searched along with the prompt; they take ``1 + C`` numbers beside
  ``federated.intrinsic``.
- The prompt stands above the embeddings and starts from the mean embedding.

Losses are no protection: a candidate with a large bias for one class has a loss from which the
share of that class among the examples follows.

Legend: P prompt tokens, D hidden size, C classes, K numbers searched for the prompt, B texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.data import tokenise
from privtune_flwr.errors import Refusal
from privtune_flwr.federated.methods import FitMethod, Outcome, Schema, Work
from privtune_flwr.federated.settings import FitSettings
from privtune_flwr.federated.whole import WholeModel, pad
from privtune_flwr.models import CutModel
from privtune_flwr.models.heads import mean_pool
from privtune_flwr.privacy.learning import State
from privtune_flwr.training.trainer import accuracy_and_loss

CANDIDATES = "candidates"
LOSSES = "losses"
POINT = "z"
#: Largest size of a searched number that a device accepts.
MAX_COORDINATE = 1e3
#: Logits are this times a cosine where the search starts.
START_SCALE = 20.0
# the scale is this many e-folds away from its start at most
_MAX_LOG_SCALE = 4.0
_MAX_PROJECTION = 2**27
_PROJECTION_STREAM = 0xBB7
_VOCABULARY_SAMPLE = 1024
_SAMPLE_LENGTH = 32


def width(settings: FitSettings, classes: int) -> int:
    """Count the numbers that are searched: the prompt's, the scale's and the biases'."""
    return settings.federated.intrinsic + 1 + classes


def draw_projection(seed: int, rows: int, intrinsic: int) -> NDArray[np.float32]:
    """Draw the fixed projection (rows, intrinsic): a function of the seed, unit variance a row.

    Parameters
    ----------
    seed : int
        The run's; cloud and devices draw the same.
    rows : int
        P times D.
    intrinsic : int
        K.
    """
    rng = np.random.default_rng([seed, _PROJECTION_STREAM])
    drawn = rng.standard_normal((rows, intrinsic), dtype=np.float32)
    return drawn / np.float32(np.sqrt(intrinsic))


class BlackBoxModel(WholeModel):
    """A model of which nothing is trained, steered by a point ``z`` of ``K + 1 + C`` numbers.

    ``z = (prompt's K, log of the scale, C biases)``. As in BBT the projection is scaled so that a
    first step of the search, ``federated.sigma``, gives prompts that spread as embeddings do.

    Parameters
    ----------
    parts : CutModel
        Cut at 0; its own classifier is not used.
    settings : FitSettings
        ``model.tuning`` and ``model.head`` do not count here.

    Raises
    ------
    Refusal
        If the projection would be too large for a device.
    """

    def __init__(self, parts: CutModel, settings: FitSettings) -> None:
        federated = settings.federated
        rows = federated.prompt_tokens * parts.spec.hidden_size
        if rows * federated.intrinsic > _MAX_PROJECTION:
            raise Refusal(
                f"request.settings: federated.intrinsic = {federated.intrinsic}: with prompts of "
                f"{rows} numbers allowed: {_MAX_PROJECTION // rows}"
            )
        prompt = settings.model.model_copy(update={"tuning": "prompt"})
        super().__init__(parts, settings.model_copy(update={"model": prompt}))
        self.settings = settings
        self.requires_grad_(False)
        self.eval()
        centre_D, spread = self._embeddings()
        scale = spread / federated.sigma
        projection = draw_projection(settings.seed, rows, federated.intrinsic) * np.float32(scale)
        self._projection = torch.from_numpy(projection)
        self._centre_PD = centre_D.expand(federated.prompt_tokens, -1).clone()
        self.register_buffer("classes_CD", self._name_classes(), persistent=False)
        self._point = np.zeros(width(settings, parts.spec.num_labels), dtype=np.float32)
        self.load({POINT: self._point})

    @torch.inference_mode()
    def _embeddings(self) -> tuple[Tensor, float]:
        """Give the mean of words' embeddings (D,) and their standard deviation around it."""
        words = int(self.bottom.base.config.vocab_size)
        ids_N = np.unique(np.linspace(0, words - 1, min(words, _VOCABULARY_SAMPLE)).astype(int))
        ids_BT = torch.from_numpy(np.resize(ids_N, (-(-len(ids_N) // _SAMPLE_LENGTH), 32)))
        rows_ND = self.bottom(ids_BT, torch.ones_like(ids_BT)).flatten(0, 1).float()
        centre_D = rows_ND.mean(0)
        return centre_D.clone(), float((rows_ND - centre_D).square().mean().sqrt())

    @torch.inference_mode()
    def _name_classes(self) -> Tensor:
        """Give the directions of sentences that name the classes, (C, D); no prompt is used."""
        sentences = [class_sentence(name) for name in self.parts.spec.labels]
        ids = tokenise(self.parts.tokenizer, sentences, self.settings.model.max_length)
        ids_CT, mask_CT = pad(ids)
        states_CTD = self.top.last_hidden(self.bottom(ids_CT, mask_CT), mask_CT)
        return nn.functional.normalize(mean_pool(states_CTD, mask_CT), dim=-1).clone()

    @property
    def scale(self) -> float:
        """What cosines are multiplied by."""
        log = float(self._point[self.settings.federated.intrinsic])
        return START_SCALE * float(np.exp(np.clip(log, -_MAX_LOG_SCALE, _MAX_LOG_SCALE)))

    @property
    def bias(self) -> NDArray[np.float32]:
        """What is added to each class's logit."""
        bias: NDArray[np.float32] = self._point[self.settings.federated.intrinsic + 1 :]
        return bias

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Classify a right-padded batch: token ids (B, T) and mask (B, T) to logits_BC."""
        hidden_BTD, mask_BT, text_BT = self.with_prompt(self.bottom(ids_BT, mask_BT), mask_BT)
        states_BD = mean_pool(self.top.last_hidden(hidden_BTD, mask_BT), text_BT)
        classes_CD = self.get_buffer("classes_CD")
        cosines_BC = nn.functional.normalize(states_BD, dim=-1) @ classes_CD.T
        return self.scale * cosines_BC + torch.from_numpy(self.bias).to(cosines_BC.device)

    def state(self) -> State:
        """Give the point."""
        return {POINT: self._point.copy()}

    def load(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Take up a point.

        Raises
        ------
        ValueError
            If it is not one of this search's, or not finite, or far outside; nothing is changed.
        """
        if set(state) != {POINT} or state[POINT].shape != self._point.shape:
            raise ValueError(f"state: must be {POINT}, of {len(self._point)} numbers")
        point = np.asarray(state[POINT], dtype=np.float32)
        if not bool((np.abs(point) <= MAX_COORDINATE).all()):
            raise ValueError(f"state: a number is not within {MAX_COORDINATE:g} of 0")
        self._point = point.copy()
        prompt = self.prompt_PD
        assert prompt is not None
        z_K = torch.from_numpy(self._point[: self.settings.federated.intrinsic])
        with torch.no_grad():
            prompt.copy_(self._centre_PD + (self._projection @ z_K).view_as(prompt))

    def beside(self) -> State:
        """Give what no checkpoint holds: the prompt, and the head made of class names."""
        assert self.prompt_PD is not None
        return {
            "prompt": self.prompt_PD.detach().cpu().numpy().copy(),
            "classes": self.get_buffer("classes_CD").cpu().numpy().copy(),
            "scale": np.array([self.scale], dtype=np.float32),
            "bias": self.bias.copy(),
        }


def class_sentence(name: str) -> str:
    """Name a class in a sentence of its own."""
    return f"this text is about {name.replace('_', ' ').replace('-', ' ')}"


class BlackBoxMethod(FitMethod):
    """Says how large the loss of each candidate is on a draw of this device's examples.

    The draw, of ``federated.bbt-examples``, is keyed by the device and the same for all candidates
    of a round: what differs between their losses is then the candidates' doing.
    """

    def fit(self, state: State, work: Work) -> Outcome:
        """Run the model forward with each candidate."""
        candidates_NK = self._candidates(state)
        count = min(len(work.sequences), self.settings.federated.bbt_examples)
        rng = np.random.default_rng(work.seed)
        chosen = sorted(rng.choice(len(work.sequences), size=count, replace=False).tolist())
        sequences = [work.sequences[i] for i in chosen]
        labels = [work.labels[i] for i in chosen]
        model = self.model
        losses_N = np.zeros(len(candidates_NK), dtype=np.float32)
        for number, point in enumerate(candidates_NK):
            model.load({POINT: point})
            losses_N[number] = accuracy_and_loss(model.logits(sequences), labels)[1]
        return Outcome({LOSSES: losses_N})

    def _candidates(self, state: State) -> NDArray[np.float32]:
        shape = (self.settings.federated.population, width(self.settings, len(self.labels)))
        if set(state) != {CANDIDATES} or state[CANDIDATES].shape != shape:
            raise ValueError(f"state: must be {CANDIDATES}, of shape {shape}")
        found = state[CANDIDATES]
        # written so that NaN is refused
        if not bool((np.abs(found) <= MAX_COORDINATE).all()):
            raise ValueError(f"state: {CANDIDATES}: a number is not within {MAX_COORDINATE:g} of 0")
        return found

    def reply_schema(self, state: State, public: Path | None = None) -> Schema:
        """Promise one loss a candidate, and nothing else."""
        return {LOSSES: ("float32", (self.settings.federated.population,))}
