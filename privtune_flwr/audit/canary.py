"""Planted leaks of known strength: an audit that misses one must not be believed.

Two are planted, each into a copy of the release, and each beside a control in which nothing is left
to find. An attack that stays silent on the first or speaks on the second is broken, or the released
rows and the text they are judged by do not belong together; then the audit reports itself as
invalid.

- *Codewords*: every row is replaced by a noise-free bank entry, of the true token with a known
  probability, else of one drawn from public text. An attack must read that share of the tokens, no
  less and, beyond chance, no more. In the control the rows are dealt out anew among all places.
- *Coin*: each sentence gets a random bit, and one fixed direction is added to the rows of those
  that drew a one. Attribute inference must find the bit. In its control it learns from shuffled
  bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.attacks.base import Attack, Released
from privtune_flwr.audit.attributes import ATTACKS, infer_attribute

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Knowledge

STRENGTH = 0.5
_ERRORS = 4.0  # standard errors that chance is granted
_SLACK = 0.03  # bank entries that coincide, words that an attack cannot tell apart
_SEPARATION = 4.0  # distance of the coin's two means, in standard deviations of pooled rows


@dataclass(frozen=True)
class Canary:
    """One planted leak and its control; shares in [0, 1].

    Attributes
    ----------
    name, attack : str
        What was planted, and who looked.
    strength : float
        Share that can be found.
    found, needed : float
        Share that was found, and the least that counts as found.
    control, control_limit : float
        Share found where nothing is to be found, and the most that chance explains.
    """

    name: str
    attack: str
    strength: float
    found: float
    needed: float
    control: float
    control_limit: float

    @property
    def passed(self) -> bool:
        """Whether the leak was found and the control was clean."""
        return self.found >= self.needed and self.control <= self.control_limit


def codeword_canary(
    attack: Attack, knowledge: Knowledge, ids: Sequence[NDArray[np.int32]], *, seed: int = 0
) -> Canary:
    """Plant codewords and let an attack on tokens look for them.

    Parameters
    ----------
    attack : Attack
        Not fitted yet.
    knowledge : Knowledge
        With the mechanism ``none``, for that is how codewords are released.
    ids : sequence of int arrays (T,)
        The true tokens of the sentences under attack.
    seed : int
        Of the planting.
    """
    rng = np.random.default_rng([seed, 1])
    true_N = np.concatenate([np.asarray(i, dtype=np.int64) for i in ids])
    counted_N = ~np.isin(true_N, knowledge.public.special_ids)
    weights_V = knowledge.prior.copy()
    weights_V[knowledge.public.special_ids] = 0
    weights_V = weights_V / weights_V.sum()
    planted_N = true_N.copy()
    decoys = rng.choice(len(weights_V), size=len(true_N), p=weights_V)
    false_N = counted_N & (rng.random(len(true_N)) >= STRENGTH)
    planted_N[false_N] = decoys[false_N]
    dealt_N = planted_N.copy()
    dealt_N[counted_N] = rng.permutation(planted_N[counted_N])
    bank_VD = knowledge.clean_means
    ends = np.cumsum([len(i) for i in ids])[:-1]

    def read(shown_N: NDArray[np.int64], *, fit: bool) -> float:
        released = Released(np.split(bank_VD[shown_N], ends))
        if fit:
            attack.fit(knowledge, released)
        guess_N = np.concatenate([g[:, 0] for g in attack.guess(released, 1)])
        return float((guess_N == true_N)[counted_N].mean())

    total = int(counted_N.sum())
    chance = _chance(true_N[counted_N], planted_N[counted_N])
    expected = STRENGTH + (1 - STRENGTH) * float(weights_V[true_N[counted_N]].mean())
    return Canary(
        name="codewords",
        attack=attack.key,
        strength=STRENGTH,
        found=read(planted_N, fit=True),
        needed=expected - _SLACK - _error(expected, total),
        control=read(dealt_N, fit=False),
        control_limit=chance + _error(chance, total),
    )


def coin_canary(
    own_rows: Sequence[NDArray[np.float32]],
    released_rows: Sequence[NDArray[np.float32]],
    *,
    seed: int = 0,
) -> Canary:
    """Plant a random bit into each sentence and let attribute inference look for it.

    Parameters
    ----------
    own_rows, released_rows : sequences of float arrays (T, d)
        The attacker's own releases, from which it learns, and those under attack.
    seed : int
        Of the planting.
    """
    rng = np.random.default_rng([seed, 2])
    pooled_SD = np.stack([r.mean(axis=0) for r in own_rows])
    direction_D = np.asarray(rng.normal(size=pooled_SD.shape[1]))
    direction_D = direction_D / np.linalg.norm(direction_D)
    step_D = direction_D * (_SEPARATION * float((pooled_SD @ direction_D).std()))

    def plant(rows: Sequence[NDArray[np.float32]]) -> tuple[list[Any], list[int]]:
        bits = rng.integers(0, 2, size=len(rows)).tolist()
        return [(r + b * step_D).astype(np.float32) for r, b in zip(rows, bits, strict=True)], bits

    own, own_bits = plant(own_rows)
    shown, bits = plant(released_rows)
    result = infer_attribute(own, own_bits, shown, bits, seed=seed, attacks=ATTACKS[:1])[0]
    return Canary(
        name="coin",
        attack=result.attack,
        strength=1.0,
        found=result.accuracy.value or 0.0,
        needed=0.9,
        control=result.shuffled.value or 0.0,
        control_limit=result.majority + _error(0.5, len(bits)),
    )


def _chance(true_N: NDArray[np.int64], shown_N: NDArray[np.int64]) -> float:
    """Probability that a place gets its own token when all are dealt out at random."""
    size = int(max(true_N.max(), shown_N.max())) + 1
    share_V = [np.bincount(i, minlength=size) / len(i) for i in (true_N, shown_N)]
    return float(share_V[0] @ share_V[1])


def _error(share: float, count: int) -> float:
    return _ERRORS * float(np.sqrt(share * (1 - share) / count))
