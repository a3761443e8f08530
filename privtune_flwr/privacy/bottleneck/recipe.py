"""Every setting of a bottleneck, as its specification carries it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from privtune_flwr.privacy.base import MechanismError, MechanismSpec, Param, ParamReader, Strength

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig

NAME = "bottleneck"
TENSORS = "bottleneck.safetensors"
MAX_WIDTH = 1024
MAX_LEVELS = 4096
MAX_RANK = 1024
_ETA_LOW, _ETA_HIGH = 1e-6, 1e6
_WARM_STARTS = ("none", "labels")


@dataclass(frozen=True)
class Shape:
    """What fixes the names and shapes of a network's state.

    Attributes
    ----------
    width, levels, positions : int
        R, L (0: not quantised) and P.
    flip, eta : float
        Randomised response for L > 0; d_chi noise for L = 0. Training sees the same chance as a
        release, so that the read-out is fitted to what will really arrive.
    adversary : bool
        Whether a decoder of tokens is trained against the symbols.
    lora_rank : int
        Of the adapters in the blocks; 0: all weights of the blocks are tuned.
    """

    width: int
    levels: int
    positions: int
    flip: float
    eta: float
    adversary: bool
    lora_rank: int


@dataclass(frozen=True)
class Recipe:
    """What is released and how it is learned.

    Attributes
    ----------
    width, levels, eta, flip : int, int, float, float
        R; L, or 0 for d_chi noise with ``eta``; randomised response on each number.
    lora_rank : int
        What of the blocks is tuned: low-rank adapters, or with 0 all weights.
    hidden_size, positions : int
        D of the bottom model, and the longest sentence.
    rounds, epochs, batch_size, learning_rate, head_learning_rate, adversary, warm_start
        Of the learning, see :class:`privtune_flwr.mechanism_config.LearningSection`.
    clip, noise : float
        Of the learning too, but the protocol applies them, not the learner.
    rounds_done : int
        0 for a draft, which releases nothing, and for what was learned on public labels alone: a
        draft has no artefact.
    """

    width: int
    levels: int
    eta: float
    flip: float
    lora_rank: int
    hidden_size: int
    positions: int
    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    adversary: float
    warm_start: str
    clip: float
    noise: float
    rounds_done: int = 0

    def __post_init__(self) -> None:
        if self.levels == 1:
            raise MechanismError(f"{NAME}.levels = 1: must be 0, or 2 at least")
        if self.levels == 0 and self.eta <= 0:
            raise MechanismError(f"{NAME}.eta = {self.eta:g}: levels = 0 needs noise, eta above 0")
        if self.levels == 0 and self.flip > 0:
            raise MechanismError(f"{NAME}.flip = {self.flip:g}: needs levels, 2 at least")
        if self.levels and self.eta > 0:
            raise MechanismError(f"{NAME}.eta = {self.eta:g}: is for levels = 0; use flip")
        if self.width > self.hidden_size:
            raise MechanismError(
                f"{NAME}.width = {self.width}: representations have {self.hidden_size} numbers"
            )
        if self.warm_start not in _WARM_STARTS:
            raise MechanismError(f"{NAME}.warm_start: allowed: {', '.join(_WARM_STARTS)}")
        if self.rounds == 0 and self.warm_start == "none":
            raise MechanismError(f"{NAME}.rounds = 0: learns nothing, unless warm_start = 'labels'")

    @classmethod
    def from_config(cls, config: PrivacyConfig, *, hidden_size: int, positions: int) -> Recipe:
        """Take the settings of a run."""
        own, learning = config.bottleneck, config.learning
        return cls(
            width=own.width,
            levels=own.levels,
            eta=own.eta,
            flip=own.flip,
            lora_rank=own.lora_rank,
            hidden_size=hidden_size,
            positions=positions,
            rounds=learning.rounds,
            epochs=learning.epochs,
            batch_size=learning.batch_size,
            learning_rate=learning.learning_rate,
            head_learning_rate=learning.head_learning_rate,
            adversary=learning.adversary,
            warm_start=learning.warm_start,
            clip=learning.clip,
            noise=learning.noise,
        )

    @classmethod
    def from_spec(cls, spec: MechanismSpec) -> Recipe:
        """Read a specification strictly.

        Raises
        ------
        MechanismError
            Naming the parameter and what is allowed.
        """
        reader = ParamReader(spec, [f.name for f in fields(cls)])
        levels = reader.integer("levels", 0, MAX_LEVELS)
        return cls(
            width=reader.integer("width", 1, MAX_WIDTH),
            levels=levels,
            eta=reader.real("eta", *((0, 0) if levels else (_ETA_LOW, _ETA_HIGH))),
            flip=reader.real("flip", 0, 1 - 1e-9),
            lora_rank=reader.integer("lora_rank", 0, MAX_RANK),
            hidden_size=reader.integer("hidden_size", 1, 65_536),
            positions=reader.integer("positions", 1, 1_000_000),
            rounds=reader.integer("rounds", 0, 1000),
            epochs=reader.integer("epochs", 1, 100),
            batch_size=reader.integer("batch_size", 1, 4096),
            learning_rate=reader.real("learning_rate", 1e-12, 10),
            head_learning_rate=reader.real("head_learning_rate", 1e-12, 10),
            adversary=reader.real("adversary", 0, 100),
            warm_start=str(spec.params["warm_start"]),
            clip=reader.real("clip", 0, 1e9),
            noise=reader.real("noise", 0, 1e9),
            rounds_done=reader.integer("rounds_done", 0, 1000),
        )

    def params(self, **changes: Param) -> dict[str, Param]:
        """Give the parameters of a specification."""
        return {**asdict(self), **changes}

    @property
    def shape(self) -> Shape:
        """What the network needs to know."""
        return Shape(
            width=self.width,
            levels=self.levels,
            positions=self.positions,
            flip=self.flip,
            eta=self.eta,
            adversary=self.adversary > 0,
            lora_rank=self.lora_rank,
        )

    @property
    def strength(self) -> Strength:
        """How much one token's row can tell, whatever was learned.

        With L levels a row is one of L**R. Randomised response adds, for each number, epsilon =
        ln(1 + L (1 - f) / f): its own level comes out with probability 1 - f + f / L, any other
        with f / L. With d_chi noise two rows are at most 2 sqrt(R) apart, the cube's diagonal.
        """
        if self.levels:
            bits = self.width * math.log2(self.levels)
            if self.flip == 0:
                return Strength(bits=bits)
            number = math.log1p(self.levels * (1 - self.flip) / self.flip)
            return Strength(epsilon=self.width * number, bits=bits)
        return Strength(eta=self.eta, epsilon=2 * self.eta * math.sqrt(self.width))
