"""Embedding rows: with full tuning those that moved name the bag of tokens.

A row of the input-embedding table gets a gradient only if its token is in the text, whatever the
optimiser and however many the steps; the others decay alike, which is known exactly. Rows of the
position table tell the longest sentence. (Known since at least Melis et al., arXiv 1805.04049.)

Legend: V vocabulary, D hidden size, P positions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.updates.base import CloudKnowledge, Reading, Update, UpdateAttack
from privtune_flwr.audit.updates.motion import Motion
from privtune_flwr.federated.whole import WholeModel

# of V rows of pure noise none is so many standard deviations above their mean norm
_DEVIATIONS = 6.0
_ROUNDINGS = 3.0


class Rows(UpdateAttack):
    """Tokens whose embedding moved by more than decay, rounding and noise explain."""

    name = "rows"

    def why_not(self, update: Update, knowledge: CloudKnowledge) -> str:
        """Need the embedding table."""
        return "" if token_table(knowledge.model) in update.sent else "no embeddings are sent"

    def read(self, update: Update, knowledge: CloudKnowledge) -> Reading:
        """Name the rows that moved, the strongest first."""
        motion = motion_of(update, knowledge)
        size_V, moved_V = moved_rows(motion, motion.table)
        chosen = np.flatnonzero(moved_V & knowledge.is_text)
        order = chosen[np.argsort(-size_V[chosen], kind="stable")]
        longest = longest_sentence(motion)
        return Reading(order, said=f"longest sentence: {longest} tokens" if longest else "")


def motion_of(update: Update, knowledge: CloudKnowledge) -> Motion:
    """Give the update with decay and clipping taken off."""
    return Motion(knowledge.model, update, token_table(knowledge.model))


def moved_rows(motion: Motion, name: str) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Measure by how much each row of a table moved, and say which moved at all.

    Most rows of a large table are in no text. If they are exactly where decay puts them, every
    other row has moved; if they are not, their typical distance is the noise, and a row has moved
    if it stands out of it.

    Returns
    -------
    size, moved : float and bool arrays, one entry a row
    """
    rest = motion.movement(name)
    size = np.linalg.norm(rest, axis=1)
    typical = float(np.median(size))
    if typical == 0.0:
        return size, size > 0
    noise = np.linalg.norm(motion.rounding(name), axis=1)
    above = typical * (1 + _DEVIATIONS / np.sqrt(2 * rest.shape[1]))
    return size, size > np.maximum(above, _ROUNDINGS * noise)


def longest_sentence(motion: Motion) -> int:
    """Tell the longest sentence in tokens from the position table; 0 where none is trained."""
    name = _name_ending(motion.model, "position_embeddings.weight")
    if name not in motion.update.sent:
        return 0
    _, moved_P = moved_rows(motion, name)
    places = np.flatnonzero(moved_P)
    return int(places[-1]) + 1 if len(places) else 0


def token_table(model: WholeModel) -> str:
    """Name the input-embedding table's parameter."""
    table = model.bottom.base.get_input_embeddings().weight
    return next(n for n, p in model.named_parameters() if p is table)


def _name_ending(model: WholeModel, ending: str) -> str:
    return next((n for n, _ in model.bottom.named_parameters("bottom") if n.endswith(ending)), "")
