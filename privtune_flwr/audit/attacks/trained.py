"""What attacks share that train a network on the attacker's own text, in steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from privtune_flwr.audit.attacks.base import Family, Level, PosteriorAttack

if TYPE_CHECKING:
    from privtune_flwr.audit.knowledge import Pair

_HELD_OUT, _HELD_OUT_TOKENS = 0.1, 1200


class TrainedAttack(PosteriorAttack):
    """An attack that is trained, and validated on text of the attacker's own.

    Parameters
    ----------
    level : Level
        How much the attacker knows.
    steps : int
        Optimiser steps at most, of about 1,024 tokens each; fewer once the loss on held-out text
        of the attacker's own has stopped falling.
    tokens : int
        Tokens of the attacker's own text to train on at most.
    seed : int
        Of initial weights, batches and sampled candidates.

    Raises
    ------
    ValueError
        If a count is not positive.
    """

    family: ClassVar[Family] = "learned"

    def __init__(self, level: Level, *, steps: int, tokens: int, seed: int = 0) -> None:
        super().__init__(level)
        if steps < 1 or tokens < 1:
            raise ValueError(f"steps = {steps}, tokens = {tokens}: both must be positive")
        self._steps, self._tokens, self._seed = steps, tokens, seed
        #: Steps, and the held-out loss by then.
        self._checked: list[tuple[int, float]] = []

    @property
    def settings(self) -> dict[str, str | int | float]:
        """Steps, tokens and seed."""
        return {"steps": self._steps, "tokens": self._tokens, "seed": self._seed}

    @property
    def curve(self) -> dict[str, Any] | None:
        """Loss on held-out text of the attacker's own; step 0 is where it started from."""
        steps, losses = zip(*self._checked, strict=True) if self._checked else ((), ())
        return {
            "x": list(steps),
            "y": list(losses),
            "xlabel": "step",
            "ylabel": "held-out loss (nats a token)",
        }


def divided(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Hold the first sentences out: in-domain ones where there are any, drawn at random else."""
    ends = np.cumsum([len(p.ids) for p in pairs])
    wanted = min(_HELD_OUT * ends[-1], _HELD_OUT_TOKENS)
    count = max(1, int(np.searchsorted(ends, wanted)))
    return pairs[:count], pairs[count:] or pairs
