"""What reaches the cloud beside the values of the rows.

Lengths, order, labels, message sizes, metrics and twins are visible whatever the noise. Each is
stated in plain words with a figure from what the cloud really holds: its store's index and the
files of the run folder around it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.protocol.replies import RELEASE_METRICS

if TYPE_CHECKING:
    from privtune_flwr.training.store import SmashedStore

_FOLDS = 5
# The device clamps outputs to +-20 and rounds the summed loss; see the client app's evaluate.
_LARGEST_LOGIT = 20.0
_LOSS_STEP = 0.01
_LEAF = 30  # sentences a length class needs before a label is read off it


@dataclass(frozen=True)
class SideChannel:
    """One thing the cloud sees.

    Attributes
    ----------
    name : str
        What.
    seen : str
        What exactly crosses, in plain words.
    figure : str
        How much it says.
    value : float or None
        The figure's main number, if it has one.
    """

    name: str
    seen: str
    figure: str
    value: float | None


@dataclass(frozen=True)
class _Sentences:
    """Released sentences of devices, first release only, in the order of release."""

    device: NDArray[np.str_]
    position: NDArray[np.float64]  # within its device, in (0, 1)
    length: NDArray[np.int64]
    label: NDArray[np.int64]  # -1: not seen


def side_channels(store: SmashedStore) -> list[SideChannel]:
    """Describe what a finished run's cloud saw beside the rows.

    Parameters
    ----------
    store : SmashedStore
        In its run folder.

    Raises
    ------
    ValueError
        If no device released a training sentence.
    """
    folder = store.folder.parent
    train = _sentences(store)
    devices = _read(folder / "devices.json")
    lines = (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    return [
        _lengths(train),
        _label_from_length(train),
        _order_and_length(train),
        _order_and_label(train),
        _labels(train),
        _sizes(store, _read(folder / "results.json")),
        *_metrics(rounds),
        _evaluations(devices, rounds),
        _twins(store),
        _description(devices),
        SideChannel(
            "gradients",
            "none: the device's part of the model is frozen, and no gradient crosses either way",
            "none",
            None,
        ),
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _first_releases(store: SmashedStore) -> list[tuple[str, int, Any]]:
    """List device, chunk and index entry of training chunks in order, of the first epoch each."""
    chunks: dict[tuple[str, int], Any] = {}
    for entry in sorted((c for c in store if c.split == "train"), key=lambda c: c.epoch):
        chunks.setdefault((entry.device, entry.chunk), entry)
    if not chunks:
        raise ValueError("no device released a training sentence")
    return [(device, chunk, chunks[device, chunk]) for device, chunk in sorted(chunks)]


def _sentences(store: SmashedStore) -> _Sentences:
    device: list[str] = []
    length: list[int] = []
    label: list[int] = []
    for name, _, entry in _first_releases(store):
        device += [name] * len(entry.lengths)
        length += entry.lengths
        label += entry.labels or [-1] * len(entry.lengths)
    names = np.array(device)
    position = np.empty(len(names))
    for name in np.unique(names):
        here = np.flatnonzero(names == name)
        position[here] = (np.arange(len(here)) + 0.5) / len(here)
    return _Sentences(names, position, np.array(length), np.array(label))


def _lengths(train: _Sentences) -> SideChannel:
    share = np.bincount(train.length) / len(train.length)
    bits = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
    number = Counter(zip(train.device.tolist(), train.length.tolist(), strict=True))
    alone = sum(n for n in number.values() if n == 1) / len(train.length)
    return SideChannel(
        "lengths",
        "the number of tokens of every sentence",
        f"{bits:.2f} bits a sentence; {100 * alone:.1f} % of the sentences are the only one of "
        "their length on their device",
        bits,
    )


def _label_from_length(train: _Sentences) -> SideChannel:
    seen = "lengths again: what an attacker who knows some labels reads off them"
    name = "label from length"
    if not _has_labels(train):
        return SideChannel(name, seen, "no labels are seen that it could be learned from", None)
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    folds = min(_FOLDS, int(np.bincount(train.label)[np.unique(train.label)].min()))
    if folds < 2:
        return SideChannel(name, seen, "too few sentences of a class", None)
    guess = cross_val_predict(
        DecisionTreeClassifier(min_samples_leaf=_LEAF, random_state=0),
        train.length[:, None],
        train.label,
        cv=StratifiedKFold(folds, shuffle=True, random_state=0),
    )
    accuracy = float((guess == train.label).mean())
    majority = float(np.bincount(train.label).max() / len(train.label))
    error = np.sqrt(accuracy * (1 - accuracy) / len(train.label))
    figure = f"{100 * accuracy:.1f} % right (standard error {100 * error:.1f}) by a decision tree, "
    figure += f"{100 * majority:.1f} % by the commonest label"
    return SideChannel(name, seen, figure, accuracy)


def _order_and_length(train: _Sentences) -> SideChannel:
    from scipy.stats import spearmanr

    seen = "the order in which a device releases; ours is shuffled under the device's secret"
    name = "order and length"
    if len(np.unique(train.length)) < 2:
        return SideChannel(name, seen, "all sentences have the same length", None)
    found = spearmanr(train.position, train.length)
    rank, chance = float(found.statistic), float(found.pvalue)
    figure = f"rank correlation of position on the device and length {rank:+.3f} (p = {chance:.2f})"
    return SideChannel(name, seen, figure, rank)


def _order_and_label(train: _Sentences) -> SideChannel:
    from scipy.stats import kruskal

    seen = "the same order: whether classes lie early or late in it"
    name = "order and label"
    if not _has_labels(train):
        return SideChannel(name, seen, "no labels are seen", None)
    groups = [train.position[train.label == c] for c in np.unique(train.label)]
    chance = float(kruskal(*groups).pvalue)
    means = [float(g.mean()) for g in groups]
    figure = f"mean relative position by class from {min(means):.3f} to {max(means):.3f} "
    figure += f"(0.5 where order says nothing; Kruskal-Wallis p = {chance:.2f})"
    return SideChannel(name, seen, figure, chance)


def _labels(train: _Sentences) -> SideChannel:
    count = int((train.label >= 0).sum())
    share = count / len(train.label)
    seen = "the label of every training sentence, in the clear" if count else "none"
    return SideChannel("labels", seen, f"{count} of {len(train.label)} labels", share)


def _sizes(store: SmashedStore, results: Any) -> SideChannel:
    tokens: Counter[str] = Counter()
    for entry in store:
        tokens[entry.device] += sum(entry.lengths)
    upload = {device: account["up"] for device, account in results["traffic"]["devices"].items()}
    shared = sorted(set(tokens) & set(upload))
    seen = "bytes of every message, also to whoever only watches the (encrypted) network"
    tokens_n, upload_n = [tokens[d] for d in shared], [upload[d] for d in shared]
    per_token = sum(upload_n) / max(1, sum(tokens_n))
    correlation = _correlation(tokens_n, upload_n)
    figure = f"{per_token:.0f} bytes a token over a device's whole upload; over {len(shared)} "
    figure += f"devices bytes and tokens correlate with {_number(correlation)}"
    return SideChannel("message sizes", seen, figure, correlation)


def _metrics(rounds: Sequence[dict[str, Any]]) -> list[SideChannel]:
    """Describe the fields that come with every release."""
    releases = [line for line in rounds if line.get("kind") == "release"]
    fields = [name for name in RELEASE_METRICS if any(name in line for line in releases)]
    tokens = [line.get("tokens", 0.0) for line in releases]
    channels = [
        SideChannel(
            "metrics in replies",
            "with every chunk: " + (", ".join(fields) or "nothing"),
            f"{len(fields)} numbers a chunk; the cloud stores their sums over the devices of a "
            "round, but could keep each device's",
            float(len(fields)),
        )
    ]
    for name in fields:
        if name.startswith("seconds") or name == "noise_norm_sum":
            correlation = _correlation(tokens, [line.get(name, 0.0) for line in releases])
            channels.append(
                SideChannel(
                    f"metric {name}",
                    "seconds a device's step took"
                    if name.startswith("seconds")
                    else "sum over a chunk's tokens of the norm of their noise",
                    f"correlates with the round's tokens with {_number(correlation)} over "
                    f"{len(releases)} release rounds",
                    correlation,
                )
            )
    return channels


def _evaluations(devices: Any, rounds: Sequence[dict[str, Any]]) -> SideChannel:
    asked = sum("eval_examples" in line for line in rounds)
    held = [n for n in devices["evaluation"].values() if n]
    classes = len(devices["labels"])
    # A count of right answers in 0..n, and a sum of n losses of at most `worst` in steps.
    worst = 2 * _LARGEST_LOGIT + np.log(classes)
    bits = [asked * (np.log2(n + 1) + np.log2(1 + n * worst / _LOSS_STEP)) for n in held]
    labels = float(np.mean([n * np.log2(classes) for n in held])) if held else 0.0
    most = float(np.mean(bits)) if held else 0.0
    return SideChannel(
        "evaluation sums",
        "for every evaluation each device answers how many of its labels the cloud's outputs "
        "matched, and the summed loss to two decimals",
        f"{asked} evaluations: at most {most:.0f} bits about a device's evaluation labels, which "
        f"hold up to {labels:.0f}; every further evaluation adds as much",
        most,
    )


def _twins(store: SmashedStore) -> SideChannel:
    received = store.received()
    owners: dict[bytes, list[str]] = {}
    total = 0
    for device, _, entry in _first_releases(store):
        for example in store.examples(entry.key):
            rows = received[example.offset : example.offset + example.length]
            owners.setdefault(hashlib.sha256(rows.tobytes()).digest(), []).append(device)
            total += 1
    within = sum(n for o in owners.values() for n in Counter(o).values() if n > 1)
    across = sum(len(o) for o in owners.values() if len(set(o)) > 1)
    return SideChannel(
        "twins",
        "whether two released sentences are byte for byte the same: on one device they are "
        "exactly if the sentences are, as noise is keyed by the sentence",
        f"{within} of {total} sentences have a twin on their device, {across} one on another",
        float(within),
    )


def _description(devices: Any) -> SideChannel:
    train = list(devices["train"].values())
    return SideChannel(
        "device's description",
        "how many training and evaluation examples each device holds, and all class names",
        f"{len(train)} devices with {min(train, default=0)} to {max(train, default=0)} training "
        f"examples; {len(devices['labels'])} class names",
        float(len(train)),
    )


def _has_labels(train: _Sentences) -> bool:
    return bool((train.label >= 0).all()) and len(np.unique(train.label)) > 1


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None where one does not vary or there are fewer than three."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _number(correlation: float | None) -> str:
    return "nothing that varies" if correlation is None else f"{correlation:+.3f}"
