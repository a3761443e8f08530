"""Attribute inference: what the cloud learns about a sentence without reading it.

The attacker owns labelled text of the same source, passes it through the same bottom model and
mechanism, learns to tell the attribute from rows, and is tested on the victims' released rows.

A leak is an accuracy above both the majority rate and the control: the same attack trained on
labels shuffled *within* each class, so that every class gets the same mix of labels and nothing of
the attribute is left to learn.

Rows that are symbols get marks of their levels beside their numbers, for pooled models' sake.

Shapes: ``T`` tokens of one sentence, ``S`` sentences, ``d`` width of a row, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privtune_flwr.audit.attacks.base import Tell, silent
from privtune_flwr.audit.attacks.levels import Levels
from privtune_flwr.audit.measure import Figure, ratio_figures

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin

Rows = Sequence[NDArray[np.float32]]
Labels = NDArray[np.int64]
#: Learns from rows and labels, then labels other rows.
_Attacker = Callable[[Rows, Labels, Rows, int, bool], Labels]

_CS = (1e-3, 1e-2, 1e-1, 1.0)
_WIDTH = 64
_BATCH = 32
_HELD_OUT = 0.15
_PATIENCE = 3
_MARKS = 512  # of levels beside a row's numbers


@dataclass(frozen=True)
class AttributeResult:
    """How well one attacker tells the attribute.

    Attributes
    ----------
    attack : str
        Method.
    accuracy : Figure
        On the victims' rows.
    balanced_accuracy : float
        Mean over classes of the share of the class that is found; 1/C is chance.
    majority : float
        Share of the commonest class among the victims.
    shuffled : Figure
        Accuracy of the control.
    n_train, n_test : int
        Sentences of the attacker, of the victims.
    """

    attack: str
    accuracy: Figure
    balanced_accuracy: float
    majority: float
    shuffled: Figure
    n_train: int
    n_test: int


def infer_attribute(
    train_rows: Rows,
    train_labels: Sequence[int] | NDArray[Any],
    test_rows: Rows,
    test_labels: Sequence[int] | NDArray[Any],
    *,
    seed: int = 0,
    quick: bool = False,
    attacks: Sequence[str] | None = None,
    tell: Tell = silent,
) -> list[AttributeResult]:
    """Attack an attribute with a linear, a pooled and a sequence model.

    Parameters
    ----------
    train_rows, test_rows : sequences of float32 arrays (T, d)
        Released rows: of the attacker's own text, and of the victims'.
    train_labels, test_labels : int sequences (S,)
        The attribute.
    seed : int
        Of initialisation, shuffling, held-out part and bootstrap.
    quick : bool
        Fewer epochs and folds.
    attacks : sequence of str, optional
        Out of :data:`ATTACKS`; all by default.
    tell : callable
        Told how far it is.

    Raises
    ------
    ValueError
        If rows and labels differ in number, or the attacker has fewer than two classes or fewer
        than five sentences of one.
    """
    own, victims = np.asarray(train_labels, np.int64), np.asarray(test_labels, np.int64)
    if len(own) != len(train_rows) or len(victims) != len(test_rows) or not len(victims):
        raise ValueError("rows and labels differ in number, or there are none to test on")
    classes, number = np.unique(own, return_counts=True)
    if len(classes) < 2 or number.min() < 5:
        raise ValueError("the attacker needs two classes and five sentences of each at least")
    train_rows, test_rows = _with_levels(train_rows, test_rows)
    fake = shuffled_within_classes(own, np.random.default_rng(seed))
    majority = float(np.bincount(victims - victims.min()).max() / len(victims))
    results = []
    chosen = ATTACKS if attacks is None else tuple(attacks)
    for index, name in enumerate(chosen):
        tell(index / len(chosen))
        attacker = _ATTACKERS[name]
        guess_S = attacker(train_rows, own, test_rows, seed, quick)
        control_S = attacker(train_rows, fake, test_rows, seed, quick)
        hit_SF = np.stack([guess_S == victims, control_S == victims], axis=1).astype(np.float64)
        accuracy, shuffled = ratio_figures(hit_SF, np.ones_like(hit_SF), seed=seed)
        balanced = np.mean([hit_SF[victims == c, 0].mean() for c in np.unique(victims)])
        results.append(
            AttributeResult(
                name, accuracy, float(balanced), majority, shuffled, len(own), len(victims)
            )
        )
    tell(1.0)
    return results


def shuffled_within_classes(labels: Labels, rng: np.random.Generator) -> Labels:
    """Deal labels out so that every true class gets the same mix of them, as far as whole go.

    A plain permutation leaves a chance correlation with the truth, which a classifier on few
    strong directions turns into an accuracy far from chance, on either side.
    """
    # All sentences in an order in which the classes are evenly mixed: by the position each has
    # within its own class, in [0, 1) and jittered.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        place[of_class] = (np.arange(len(of_class)) + rng.random(len(of_class))) / len(of_class)
    fake = np.empty_like(labels)
    # Any run of consecutive places holds all classes in their proportions.
    fake[np.argsort(place)] = np.sort(labels)
    return fake


def _with_levels(own: Rows, victims: Rows) -> tuple[Rows, Rows]:
    """Put marks of levels beside symbols' numbers: pooled, they count how often each occurs."""
    levels = Levels.of(np.concatenate(own))
    if levels is None or sum(levels.sizes) > _MARKS:
        return own, victims
    marked = [
        [np.concatenate([r, levels.one_hot(r)], axis=1) for r in rows] for rows in (own, victims)
    ]
    return marked[0], marked[1]


def _pool_mean(rows: Rows) -> NDArray[np.float32]:
    return np.stack([r.mean(axis=0) for r in rows])


def _pool_all(rows: Rows) -> NDArray[np.float32]:
    return np.stack([np.concatenate([r.mean(0), r.std(0), r.max(0)]) for r in rows])


def _linear(
    pool: Callable[[Rows], NDArray[np.float32]],
) -> _Attacker:
    def attack(own: Rows, labels: Labels, victims: Rows, seed: int, quick: bool) -> Labels:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV

        search = GridSearchCV(
            LogisticRegression(max_iter=200, tol=1e-3), {"C": list(_CS)}, cv=3 if quick else 5
        )
        return _fit_predict(search, pool(own), labels, pool(victims))

    return attack


def _perceptron(own: Rows, labels: Labels, victims: Rows, seed: int, quick: bool) -> Labels:
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(
        hidden_layer_sizes=(128,),
        alpha=1e-2,
        early_stopping=True,
        validation_fraction=_HELD_OUT,
        n_iter_no_change=5 if quick else 15,
        max_iter=30 if quick else 200,
        random_state=seed,
    )
    return _fit_predict(network, _pool_all(own), labels, _pool_all(victims))


def _fit_predict(
    model: ClassifierMixin, own: NDArray[Any], labels: Labels, victims: NDArray[Any]
) -> Labels:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with warnings.catch_warnings():
        # The number of iterations is a budget here, not a promise.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = make_pipeline(StandardScaler(), model).fit(own, labels)
    return np.asarray(fitted.predict(victims), dtype=np.int64)


class _SequenceModel(nn.Module):
    """A small transformer with attention pooling; rows come standardised."""

    def __init__(self, width: int, classes: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, _WIDTH)
        layer = nn.TransformerEncoderLayer(
            _WIDTH, 4, 2 * _WIDTH, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.weigh = nn.Linear(_WIDTH, 1)
        self.leave = nn.Sequential(
            nn.LayerNorm(_WIDTH), nn.Dropout(0.2), nn.Linear(_WIDTH, classes)
        )

    def forward(self, rows_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        hidden_BTH = self.blocks(self.enter(rows_BTD), src_key_padding_mask=padding_BT)
        weight_BT1 = self.weigh(hidden_BTH).masked_fill(padding_BT[:, :, None], -torch.inf)
        pooled_BH = (weight_BT1.softmax(dim=1) * hidden_BTH).sum(dim=1)
        logits_BC: Tensor = self.leave(pooled_BH)
        return logits_BC


def _transformer(own: Rows, labels: Labels, victims: Rows, seed: int, quick: bool) -> Labels:
    classes, target = np.unique(labels, return_inverse=True)
    stacked = np.concatenate(own)
    mean_D, scale_D = stacked.mean(axis=0), stacked.std(axis=0) + 1e-6
    own = [(r - mean_D) / scale_D for r in own]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(own))
    held, learn = np.split(order, [max(1, round(_HELD_OUT * len(own)))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _SequenceModel(stacked.shape[1], len(classes), 1 if quick else 2)
        _train(model, own, target, learn, held, rng, epochs=8 if quick else 30)
    guess_SC = _logits(model, [(r - mean_D) / scale_D for r in victims])
    return np.asarray(classes[guess_SC.argmax(dim=1).numpy()], dtype=np.int64)


def _train(
    model: _SequenceModel,
    rows: Rows,
    target: NDArray[np.int64],
    learn: NDArray[np.int64],
    held: NDArray[np.int64],
    rng: np.random.Generator,
    *,
    epochs: int,
) -> None:
    """Fit until the held-out loss has not fallen for some epochs; keep the best weights."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    best, best_state, worse = float("inf"), model.state_dict(), 0
    held_target = torch.from_numpy(target[held])
    for _ in range(epochs):
        model.train()
        for batch in _batches(rows, learn, rng):
            loss = nn.functional.cross_entropy(
                model(*_padded([rows[i] for i in batch])), torch.from_numpy(target[batch])
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        now = nn.functional.cross_entropy(
            _logits(model, [rows[i] for i in held]), held_target
        ).item()
        if now < best:
            best, worse = now, 0
            best_state = {k: v.clone() for k, v in model.state_dict().items()}
        elif (worse := worse + 1) == _PATIENCE:
            break
    model.load_state_dict(best_state)


def _batches(
    rows: Rows, learn: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Group sentences of like length, which saves padding; jitter and order change every epoch."""
    lengths = np.array([len(rows[i]) for i in learn])
    order = learn[np.argsort(lengths * rng.uniform(0.8, 1.25, len(learn)))]
    batches = [order[s : s + _BATCH] for s in range(0, len(order), _BATCH)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _padded(rows: Rows) -> tuple[Tensor, Tensor]:
    tensors = [torch.from_numpy(np.asarray(r, dtype=np.float32)) for r in rows]
    lengths = torch.tensor([len(t) for t in tensors])
    rows_BTD = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return rows_BTD, torch.arange(rows_BTD.shape[1])[None] >= lengths[:, None]


@torch.inference_mode()
def _logits(model: _SequenceModel, rows: Rows) -> Tensor:
    model.eval()
    parts = [model(*_padded(rows[s : s + _BATCH])) for s in range(0, len(rows), _BATCH)]
    return torch.cat(parts)


_ATTACKERS: dict[str, _Attacker] = {
    "logistic: mean": _linear(_pool_mean),
    "logistic: mean, deviation, maximum": _linear(_pool_all),
    "perceptron: mean, deviation, maximum": _perceptron,
    "transformer: all rows": _transformer,
}

#: Names of the attackers, the simplest first.
ATTACKS: tuple[str, ...] = tuple(_ATTACKERS)
