"""Using what a run has trained: text to classes, the way a private query goes.

Each text passes the bottom model, the run's mechanism, the wire and the top model. So a release of
few symbols, which no ordinary checkpoint of one piece takes, is served like any other.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax

from privtune_flwr.cloud import prepare_cloud
from privtune_flwr.config import load_run_config
from privtune_flwr.data import tokenise
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.learned import adopt_learned
from privtune_flwr.training import checkpoint
from privtune_flwr.training.store import Example

_KEY_BYTES = 32


class PredictionError(PrivTuneError, ValueError):
    """A run that cannot be used; the message says why."""


@dataclass(frozen=True)
class Prediction:
    """What a run's model says of one text.

    Attributes
    ----------
    label : str
        The most probable class.
    probabilities : dict
        Of each class.
    """

    label: str
    probabilities: dict[str, float]


def predict(run: Path, texts: Sequence[str], *, key: bytes | None = None) -> list[Prediction]:
    """Classify texts with a finished run's model.

    Parameters
    ----------
    run : Path
        The run's folder.
    texts : sequence of str
        Any number; none of them is stored.
    key : bytes, optional
        32 bytes that noise is keyed by; fresh ones by default. Asking again about the same text
        with another key is another release of it.

    Returns
    -------
    list of Prediction
        In the order of the texts.

    Raises
    ------
    PredictionError
        If the folder holds no finished run.
    """
    needed = [run / name for name in ("config.json", "devices.json", "checkpoint.pt")]
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise PredictionError(f"{run}: not the folder of a finished run, it lacks {missing[0]}")
    if not texts:
        return []
    saved = json.loads(needed[0].read_text(encoding="utf-8"))
    labels = [str(v) for v in json.loads(needed[1].read_text(encoding="utf-8"))["labels"]]
    config = load_run_config(saved["config"])
    cloud = prepare_cloud(config)
    adopt_learned(cloud, run)
    _, trainer = cloud.build_top(labels, fresh=False)
    checkpoint.load(needed[2], trainer)
    ids = tokenise(cloud.bottom.tokenizer, list(texts), config.model.max_length)
    rows_ND, lengths = cloud.release(ids, key or secrets.token_bytes(_KEY_BYTES), 0)
    decoder = cloud.decoder()
    if decoder is not None:
        rows_ND = decoder(rows_ND)
    starts = np.cumsum([0, *lengths[:-1]])
    examples = [Example(int(s), n, -1) for s, n in zip(starts, lengths, strict=True)]
    shares_BC = softmax(trainer.logits(rows_ND, examples).astype(np.float64), axis=1)
    return [
        Prediction(
            labels[int(share_C.argmax())],
            {name: float(value) for name, value in zip(labels, share_C, strict=True)},
        )
        for share_C in shares_BC
    ]
