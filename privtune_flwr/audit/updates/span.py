"""The span check: a first block's gradient names the tokens, one position at a time.

The gradient of a linear layer's weight is a sum of outer products of what came back and what went
in, so its rows lie in the span of the layer's inputs. The input of the first block's attention is
a known function of one token and its position: the cloud tries every token at every position and
keeps those that lie in the span. That is exact as long as there are fewer tokens than dimensions.
Petrov et al. (DAGER, NeurIPS 2024, arXiv 2405.15586) showed it for gradients; here it is held
against what devices really send: float32 weights after plain SGD or Adam, scaled and noised or
not. The test's threshold is ours: how far rounding alone moves a true input out of the span.

Of LoRA's A only r rows arrive (2r with two adapted projections): beyond so many tokens nothing can
be tested, and tokens are only ranked by how much of them lies in the span.

Legend: M rows, D columns, K dimensions of the span, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import (
    NOTHING,
    CloudKnowledge,
    Reading,
    Update,
    UpdateAttack,
)
from privtune_flwr.audit.updates.inputs import as_rows, candidate_inputs, reading_weights
from privtune_flwr.audit.updates.motion import Motion
from privtune_flwr.audit.updates.rows import longest_sentence, motion_of, moved_rows
from privtune_flwr.federated.whole import WholeModel

_RELATIVE = 1e-6  # float32's own error in a sum of products
_EDGE = 1.6  # above random matrix theory's edge: rounding is not even over entries
_OUT = 3.0  # times the expected error: out of the span
_LEAST = 1e-4
_NEAR = 0.02  # farther than this nothing counts as inside, whatever the noise
_FULL = 0.9
_BLOCK = 32
_SAMPLED = (1, 5)  # positions at which tokens are ranked
_MANY = 4


@dataclass(frozen=True)
class Span:
    """What is known of the span of a block's inputs.

    Attributes
    ----------
    basis_KD : float64 array
        Orthonormal rows, strongest first.
    strength_K : float64 array
        Their singular values.
    noise : float
        Standard deviation of an entry of the matrix that is not the gradient's.
    """

    basis_KD: NDArray[np.float64]
    strength_K: NDArray[np.float64]
    noise: float

    @property
    def full(self) -> bool:
        """Whether nearly everything lies in it, so that it tells nothing."""
        return bool(len(self.basis_KD) > _FULL * self.basis_KD.shape[1])

    def outside(self, inputs_CD: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
        """Measure how far vectors are from it, and how far rounding would move a true one.

        Perturbation theory to first order: of a true input with coordinates c_k the part outside
        has norm ``noise * sqrt(D - K) * sqrt(sum((c_k / s_k)^2))``.

        Returns
        -------
        distance_C, error_C : float64 arrays
            Both as shares of the vector's norm.
        """
        inputs = inputs_CD.astype(np.float64)
        coordinates_CK = inputs @ self.basis_KD.T
        norms = np.linalg.norm(inputs, axis=1)
        inside = np.square(coordinates_CK).sum(axis=1)
        rest = np.sqrt(np.maximum(0.0, np.square(norms) - inside))
        free = max(1, self.basis_KD.shape[1] - len(self.basis_KD))
        spread = np.linalg.norm(coordinates_CK / self.strength_K, axis=1)
        return rest / norms, self.noise * np.sqrt(free) * spread / norms

    def holds(self, inputs_CD: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Say which vectors lie in it, as far as rounding lets one see."""
        distance, error = self.outside(inputs_CD)
        return np.asarray(distance <= np.minimum(_NEAR, np.maximum(_LEAST, _OUT * error)))


def find_span(motion: Motion, level: int) -> Span | None:
    """Find the span of a block's inputs in an update; None where nothing moved there."""
    names = reading_weights(motion.model, level)
    if not names:
        return None
    rows_MD = np.concatenate([as_rows(motion.model, n, motion.movement(n)) for n in names])
    noise = np.sqrt(np.mean([np.square(motion.rounding(n)).mean() for n in names]))
    _, strength, basis = np.linalg.svd(rows_MD, full_matrices=False)
    edge = _EDGE * noise * (np.sqrt(rows_MD.shape[0]) + np.sqrt(rows_MD.shape[1]))
    kept = strength > max(edge, _RELATIVE * strength[0])
    if not kept.any():
        return None
    return Span(basis[kept], strength[kept], float(noise))


class SpanCheck(UpdateAttack):
    """Tokens at positions that the span holds; whole sentences where there are few.

    Parameters
    ----------
    with_rows : bool
        Test only tokens whose embedding row moved, where embeddings are sent: a cloud would, and
        it is sooner done. The result says so; a ranking is always of the whole vocabulary.
    seconds : float
        To spend on putting sentences together.
    """

    name = "span"

    def __init__(self, *, with_rows: bool = True, seconds: float = 20.0) -> None:
        self.with_rows = with_rows
        self.seconds = seconds

    def why_not(self, update: Update, knowledge: CloudKnowledge) -> str:
        """Need a trained projection of the first block."""
        return "" if reading_weights(knowledge.model, 0) else "no attention projection is sent"

    def read(self, update: Update, knowledge: CloudKnowledge) -> Reading:
        """Test the vocabulary; rank it where there are more tokens than can be tested."""
        motion = motion_of(update, knowledge)
        span = find_span(motion, 0)
        if span is None:
            return Reading(NOTHING, said="no gradient reached the first block's projections")
        knowledge.model.load(update.sent)
        said = f"{len(span.basis_KD)} of {span.basis_KD.shape[1]} dimensions"
        vocabulary = self._vocabulary(motion, knowledge)
        wanted = knowledge.expected(update.examples)[0]
        if not span.full:
            longest = longest_sentence(motion)
            found = held_tokens(knowledge.model, span, vocabulary, longest)
            tokens = order_of(found, knowledge)
            if 0 < len(tokens) <= _MANY * wanted:
                sentences = self._assembled(motion, knowledge, found)
                helped = len(vocabulary) < knowledge.vocabulary
                tried = "; only tokens whose row moved were tried" if helped else ""
                return Reading(tokens, sentences, said + tried)
        # over the whole vocabulary: what the rows know must not pass for the span's own
        ranked = rank_tokens(knowledge, span, np.arange(knowledge.vocabulary), update.examples)
        return Reading(ranked[:wanted], said=f"{said}; tokens are ranked, not tested")

    def _vocabulary(self, motion: Motion, knowledge: CloudKnowledge) -> NDArray[np.int64]:
        if self.with_rows and motion.table in motion.update.sent:
            _, moved = moved_rows(motion, motion.table)
            if moved.any():
                return np.flatnonzero(moved)
        return np.arange(knowledge.vocabulary)

    def _assembled(
        self, motion: Motion, knowledge: CloudKnowledge, found: Sequence[NDArray[np.int64]]
    ) -> list[NDArray[np.int64]]:
        from privtune_flwr.audit.updates.assembly import assemble

        return assemble(
            knowledge,
            found,
            find_span(motion, 1),
            sentences=motion.update.examples,
            seconds=self.seconds,
        )


def held_tokens(
    model: WholeModel, span: Span, vocabulary: NDArray[np.int64], longest: int
) -> list[NDArray[np.int64]]:
    """List the tokens that the span holds at each position, up to the first that has none.

    Parameters
    ----------
    model : WholeModel
        With the sent state in it.
    longest : int
        Positions to look at; 0 if that is not known.
    """
    limit = min(model.settings.model.max_length, model.bottom.max_positions or 8192)
    length = longest or min(_BLOCK, limit)
    while True:
        found = _held(model, span, vocabulary, length)
        if longest or len(found) < length or length == limit:
            return found
        length = min(2 * length, limit)


def _held(
    model: WholeModel, span: Span, vocabulary: NDArray[np.int64], length: int
) -> list[NDArray[np.int64]]:
    basis_DK = span.basis_KD.T.astype(np.float32)
    parts: list[tuple[NDArray[Any], ...]] = []
    for tokens_C, inputs_CPD in candidate_inputs(model, vocabulary, length):
        # float32 is enough to see what is far out
        norms_CP = np.square(inputs_CPD).sum(axis=2)
        inside_CP = np.square(inputs_CPD @ basis_DK).sum(axis=2)
        which, place = np.nonzero(norms_CP - inside_CP <= (2 * _NEAR) ** 2 * norms_CP)
        near_ND = inputs_CPD[which, place]
        held = span.holds(near_ND)
        distance_N, _ = span.outside(near_ND)
        parts.append((tokens_C[which[held]], place[held], distance_N[held]))
    tokens_N, place_N, distance_N = (np.concatenate(p) for p in zip(*parts, strict=True))
    order = np.argsort(distance_N, kind="stable")
    found: list[NDArray[np.int64]] = []
    for position in range(length):
        here = tokens_N[order[place_N[order] == position]]
        if not len(here):
            break
        found.append(here)
    return found


def order_of(found: Sequence[NDArray[np.int64]], knowledge: CloudKnowledge) -> NDArray[np.int64]:
    """Give the distinct tokens of all positions, no special ones."""
    if not found:
        return NOTHING
    tokens = np.unique(np.concatenate(list(found)))
    kept: NDArray[np.int64] = tokens[knowledge.is_text[tokens]]
    return kept


def rank_tokens(
    knowledge: CloudKnowledge, span: Span, vocabulary: NDArray[np.int64], examples: int
) -> NDArray[np.int64]:
    """Rank tokens by the share of their inputs that lies in the span, special ones left out.

    What all inputs have in common is taken off first. Of a span that noise has filled only the
    strongest directions count.
    """
    dimensions = span.basis_KD.shape[1]
    most = max(1, min(round(examples * knowledge.mean_length), dimensions // 4))
    basis_DK = span.basis_KD[:most].T.astype(np.float32)
    places = list(_SAMPLED)
    length = places[-1] + 1
    common = knowledge.commonest[:1000]
    sampled = [i[:, places] for _, i in candidate_inputs(knowledge.model, common, length)]
    mean_PD = np.concatenate(sampled).mean(axis=0)
    shares = []
    for _, inputs_CPD in candidate_inputs(knowledge.model, vocabulary, length):
        own_CPD = inputs_CPD[:, places] - mean_PD
        inside_CP = np.square(own_CPD @ basis_DK).sum(axis=2)
        shares.append((inside_CP / np.square(own_CPD).sum(axis=2)).mean(axis=1))
    ranked = vocabulary[np.argsort(-np.concatenate(shares), kind="stable")]
    kept: NDArray[np.int64] = ranked[knowledge.is_text[ranked]]
    return kept
