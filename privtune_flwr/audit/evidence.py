"""What is attacked, and the truth it is judged by.

In a simulation both are there: rows as the cloud received them, and the devices' text. Of real
devices only the rows are; the audit then attacks a *stand-in*, text that the cloud rightly holds
and that went through the same mechanism, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from privtune_flwr.audit.attacks.base import Released
from privtune_flwr.audit.operator import (
    AuditError,
    ReleasedText,
    check_lengths,
    class_names,
    is_simulation,
    released_text,
    stored_rows,
)
from privtune_flwr.cloud import TEST_CHUNK, TEST_DEVICE, CloudSide
from privtune_flwr.config import PUBLIC_CORPORA, RunConfig
from privtune_flwr.data import load_public_text, load_source, split_source, tokenise
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.training.store import SmashedStore


@dataclass(frozen=True)
class OwnText:
    """Text of the devices' source that no device holds: what the level ``in-domain`` owns."""

    ids: list[npt.NDArray[np.int32]]
    labels: list[int]


@dataclass(frozen=True)
class Evidence:
    """Rows under attack, their truth, and the attacker's own similar text.

    Attributes
    ----------
    kind : {"private", "stand-in"}
        Whose text it is.
    said : str
        The same in plain words, for the report.
    text : ReleasedText
        Rows and truth.
    in_domain : OwnText
        Empty if there is none.
    label_names : sequence of str
        Class names; empty if the labels mean nothing here.
    """

    kind: Literal["private", "stand-in"]
    said: str
    text: ReleasedText
    in_domain: OwnText
    label_names: Sequence[str]

    @property
    def released(self) -> Released:
        """The rows alone."""
        return Released(self.text.rows)


def gather(
    folder: Path,
    config: RunConfig,
    cloud: CloudSide,
    store: SmashedStore,
    *,
    sentences: int,
    in_domain: int,
    seed: int = 0,
) -> Evidence:
    """Choose what to attack.

    Parameters
    ----------
    folder : Path
        The run's.
    config, cloud, store
        From :func:`~privtune_flwr.audit.operator.open_run`.
    sentences : int
        Under attack, at most.
    in_domain : int
        Sentences of the same source that the attacker owns, at most.
    seed : int
        Of the draw.

    Raises
    ------
    AuditError
        If neither the devices' text nor a stand-in is at hand.
    """
    names = class_names(folder)
    if is_simulation(store):
        text = released_text(config, cloud, store, sentences=sentences, seed=seed)
        released = sum(len(c.lengths) for c in store if c.split == "train" and c.epoch == 0)
        said = (
            f"{len(text.ids)} of the {released} training sentences that the simulated devices "
            "released, drawn at random, as the cloud received them"
        )
        return Evidence(
            "private", said, text, _own_text(config, cloud, set(), in_domain, seed), names
        )
    if config.data.test_source != "none" and config.data.test_examples:
        text = _test_text(config, cloud, store, names, sentences, seed)
        said = (
            f"a stand-in: {len(text.ids)} sentences of the cloud's own test set, released through "
            "the same mechanism; the devices are real ones and their text is not known here"
        )
        own = _own_text(config, cloud, {_normal(t) for t in text.texts}, in_domain, seed)
        return Evidence("stand-in", said, text, own, names)
    text, corpus = _public_stand_in(config, cloud, sentences, seed)
    said = (
        f"a stand-in: {len(text.ids)} sentences of the public corpus {corpus}, released here "
        "through the run's mechanism; the devices are real ones and their text is not known here. "
        "Their text may be easier or harder to read"
    )
    return Evidence("stand-in", said, text, OwnText([], []), [])


def _own_text(
    config: RunConfig, cloud: CloudSide, victims: set[str], size: int, seed: int
) -> OwnText:
    """Gather the source's texts that are in no device's part and are not under attack."""
    data = config.data
    if data.source.startswith("file:"):
        return OwnText([], [])
    names = [n for n in data.labels.split(",") if n]
    source = load_source(
        data.source, text_column=data.text_column, label_column=data.label_column, labels=names
    )
    pool = split_source(source, data, seed=config.run.seed).pool
    barred = victims | {_normal(t) for t in pool["text"]}
    texts, labels = source["text"][:], source["label"][:]
    free = [i for i, text in enumerate(texts) if _normal(text) not in barred]
    chosen = np.random.default_rng(seed).permutation(free)[:size]
    ids = tokenise(cloud.bottom.tokenizer, [texts[int(i)] for i in chosen], config.model.max_length)
    return OwnText(ids, [int(labels[int(i)]) for i in chosen])


def _test_text(
    config: RunConfig,
    cloud: CloudSide,
    store: SmashedStore,
    names: Sequence[str],
    sentences: int,
    seed: int,
) -> ReleasedText:
    test = cloud.load_test_set(names)
    position = [list(names).index(name) for name in test.features["label"].names]
    drawn = np.random.default_rng(seed).permutation(len(test))[:sentences].tolist()
    texts = [str(test["text"][i]) for i in drawn]
    text = ReleasedText(
        [
            stored_rows(store, (TEST_DEVICE, "test", 0, i // TEST_CHUNK), i % TEST_CHUNK)
            for i in drawn
        ],
        tokenise(cloud.bottom.tokenizer, texts, config.model.max_length),
        texts,
        [position[int(test["label"][i])] for i in drawn],
        [],
    )
    check_lengths(text)
    return text


def _public_stand_in(
    config: RunConfig, cloud: CloudSide, sentences: int, seed: int
) -> tuple[ReleasedText, str]:
    free = [c for c in PUBLIC_CORPORA if c not in config.data.public_corpora]
    if not free:
        raise AuditError(
            "the devices are real ones, there is no test set, and the mechanism was designed on "
            "all public corpora: leave one out of data.public-text, or set data.test-source"
        )
    corpus = load_public_text(free[:1])
    rng = np.random.default_rng(seed)
    texts = [corpus[int(i)] for i in rng.permutation(len(corpus))[:sentences]]
    ids = tokenise(cloud.bottom.tokenizer, texts, config.model.max_length)
    secret = rng.bytes(32)
    rows = [
        cloud.mechanism.perturb(hidden, own, keyed_generator(secret, "stand-in", number))
        for number, (hidden, own) in enumerate(zip(cloud.bottom.encode(ids), ids, strict=True))
    ]
    return ReleasedText(rows, ids, texts, [-1] * len(ids), []), free[0]


def _normal(text: Any) -> str:
    return " ".join(str(text).casefold().split())
