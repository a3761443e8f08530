"""The mechanism ``bottleneck``: a few symbols a token, from blocks that were tuned for the task.

Our own design. The device passes a sentence through its own copy of the bottom model, whose blocks
were tuned by federated averaging, projects each row to R numbers, squashes them into [-1, 1] and
either rounds them to L levels (optionally with randomised response) or adds d_chi noise. How much
a row can carry is bounded by R and L alone, whatever the cloud put into the artefact.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``R`` numbers a token, ``P`` positions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    Strength,
)
from privtune_flwr.privacy.bottleneck.recipe import NAME, TENSORS, Recipe
from privtune_flwr.privacy.dchi import sample_dchi
from privtune_flwr.privacy.learning import State

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.bottleneck.learner import BottleneckLearner
    from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork
    from privtune_flwr.privacy.privtune.bank import Bottom
    from privtune_flwr.privacy.public import PublicKnowledge

_MAX_ARTEFACT_BYTES = 4 << 30


class Bottleneck(Mechanism):
    """Release R symbols a token, computed by the device's own tuned blocks.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    recipe : Recipe
        Read from it.
    state : State
        The artefact's arrays; empty for a draft.
    """

    name: ClassVar[str] = NAME
    reads: ClassVar[Literal["rows", "tokens"]] = "tokens"
    additive: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    def __init__(self, spec: MechanismSpec, recipe: Recipe, state: State) -> None:
        super().__init__(spec)
        self.recipe = recipe
        self._state = state
        self._network: BottleneckNetwork | None = None

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Give the draft that the learning starts from; nothing can be released with it."""
        recipe = Recipe.from_config(
            config, hidden_size=public.hidden_size, positions=public.max_length
        )
        return MechanismSpec(cls.name, recipe.params())

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from what the cloud sent.

        Block weights can be compared with the model's only in :meth:`attach`.
        """
        recipe = Recipe.from_spec(spec)
        if not spec.artefact and recipe.rounds_done == 0:
            return cls(spec, recipe, {})
        state = _read(artefact)
        width, hidden = recipe.width, recipe.hidden_size
        shapes = {
            "projection.weight": (width, hidden),
            "lift.projection": (width, hidden),
            "lift.positions": (recipe.positions, hidden),
        }
        for name, shape in shapes.items():
            if name not in state or state[name].shape != shape:
                raise MechanismError(f"{cls.name}: artefact tensor {name} must be float32 {shape}")
        return cls(spec, recipe, state)

    def attach(self, bottom: Bottom) -> Self:
        """Copy the bottom model's blocks and tune the copy; the original stays as it is.

        Raises
        ------
        MechanismError
            If the bottom model is no real one, or the artefact's blocks are not those of this one.
        """
        import torch

        from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork

        super().attach(bottom)
        if bottom.hidden_size != self.recipe.hidden_size:
            raise MechanismError(
                f"{self.name}.hidden_size = {self.recipe.hidden_size}: the bottom model has "
                f"{bottom.hidden_size}"
            )
        if self._state:
            with torch.random.fork_rng(devices=[]):
                network = BottleneckNetwork(bottom, self.recipe.shape)
            network.put(self._state)
            self._network = network
        return self

    @classmethod
    def learner(
        cls, spec: MechanismSpec, artefact: Path | None, bottom: Bottom, num_labels: int
    ) -> BottleneckLearner:
        """Build what learns blocks, projection and lift; a draft has no artefact."""
        from privtune_flwr.privacy.bottleneck.learner import BottleneckLearner

        recipe = Recipe.from_spec(spec)
        if spec.artefact or recipe.rounds_done:
            raise MechanismError(f"{cls.name}: is frozen and cannot be learned again")
        return BottleneckLearner(recipe, bottom, num_labels)

    def width(self, hidden_size: int) -> int:
        """Give R."""
        return self.recipe.width

    @property
    def eta_max(self) -> float | None:
        """The noise's eta in the R dimensions, if there is noise."""
        return self.strength.eta

    @property
    def strength(self) -> Strength:
        """What R, L and the noise bound, whatever was learned."""
        return self.recipe.strength

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Read the bound off the specification: the artefact cannot change it."""
        return Recipe.from_spec(spec).strength

    @classmethod
    def declared_eta(cls, spec: MechanismSpec) -> float | None:
        """Give eta where the release is noised, ``None`` where it is quantised."""
        return cls.declared(spec).eta

    def lift_start(self) -> State:
        """Give what the cloud's front starts from.

        Returns
        -------
        dict
            ``projection`` (R, d) and ``positions`` (P, d), float32: lifted rows are
            ``symbols @ projection + positions[t]``, as the read-out of the learning used them.

        Raises
        ------
        MechanismError
            If nothing has been learned yet.
        """
        self._check_learned()
        return {
            "projection": self._state["lift.projection"].copy(),
            "positions": self._state["lift.positions"].copy(),
        }

    def guarantee(self) -> Guarantee:
        """State the bound on what one row carries, and what is not promised."""
        r, levels, strength = self.recipe.width, self.recipe.levels, self.strength
        if levels:
            law = (
                f"Each token's row is one of {levels}^{r} rows, so it carries at most "
                f"{strength.bits:.6g} bits, exactly and for every token, special ones included, "
                "whatever weights the cloud put into the artefact."
            )
            if strength.epsilon is not None:
                law += (
                    f" Each number passes k-ary randomised response (probability "
                    f"{self.recipe.flip:.6g} of a level at random): a token's row is epsilon-"
                    f"locally private with epsilon = {strength.epsilon:.6g}, for any two sentences."
                )
        else:
            law = (
                f"Each token's row is {r} numbers in [-1, 1] plus d_chi noise of eta = "
                f"{self.recipe.eta:.6g}. Rows are at most 2 sqrt({r}) apart, so one row is also "
                f"epsilon-locally private with epsilon = {strength.epsilon:.6g}, for any two "
                "sentences and whatever weights the cloud put into the artefact."
            )
        return Guarantee(
            metric="Euclidean distance of two rows of squashed numbers, in [-1, 1] each",
            adversary="knows everything but the device's secret, the tuned weights included",
            eta=strength.eta,
            statement=f"{law} A row depends on its whole sentence, so what is told about one word "
            "may stand in several rows: bits and epsilon compose over the tokens of a sentence. "
            f"Sentence lengths are not hidden. {self._origin()}",
        )

    def _origin(self) -> str:
        if self.recipe.rounds == 0:
            return (
                "No device's update went into the weights: the cloud learned them on public labels."
            )
        return (
            "The weights were learned from private text: what the updates told before this "
            "release is a matter of the learning rounds' clipping and noise, and is not bounded "
            "here."
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        self._check_learned()
        squashed_TR = self._squash(ids_T)
        levels = self.recipe.levels
        if not levels:
            noise_TR = sample_dchi(rng, len(ids_T), self.recipe.width, self.recipe.eta)
            return squashed_TR + noise_TR
        chosen_TR = quantise(squashed_TR, levels)
        if self.recipe.flip > 0:
            chosen_TR = randomise(chosen_TR, levels, self.recipe.flip, rng)
        return chosen_TR.astype(np.float64) * 2.0 / (levels - 1) - 1.0

    def _check_learned(self) -> None:
        if not self._state:
            raise MechanismError(f"{self.name}: has not been learned yet; nothing released")

    def _squash(self, ids_T: NDArray[np.int64]) -> NDArray[np.float64]:
        import torch

        bottom = self.bottom  # refuses if none is attached
        assert self._network is not None
        if len(ids_T) > self.recipe.positions:
            raise MechanismError(
                f"{self.name}.positions = {self.recipe.positions}: a sentence has {len(ids_T)}"
            )
        if len(ids_T) and not (ids_T.min() >= 0 and ids_T.max() < bottom.vocab_size):
            raise MechanismError(f"{self.name}: a token id lies outside the vocabulary")
        if not len(ids_T):
            return np.zeros((0, self.recipe.width))
        with torch.inference_mode():
            ids_1T = torch.from_numpy(ids_T)[None]
            squashed_TR = self._network.squash(ids_1T, torch.ones_like(ids_1T))[0]
        squashed = squashed_TR.numpy().astype(np.float64)
        if not np.isfinite(squashed).all():
            raise MechanismError(f"{self.name}: a squashed number is not finite; nothing released")
        return squashed


def quantise(squashed: NDArray[np.float64], levels: int) -> NDArray[np.int64]:
    """Give the number of the nearest of ``levels`` numbers, equally spaced from -1 to 1."""
    level = np.rint((squashed + 1.0) / 2.0 * (levels - 1)).astype(np.int64)
    return np.clip(level, 0, levels - 1)


def randomise(
    level: NDArray[np.int64], levels: int, flip: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Replace each number, with probability ``flip``, by one of all levels at random."""
    anything = rng.integers(levels, size=level.shape)
    return np.where(rng.random(level.shape) < flip, anything, level)


def _read(artefact: Path | None) -> State:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = None if artefact is None else artefact / TENSORS
    if path is None or not path.is_file():
        raise MechanismError(f"{NAME}: needs its artefact, a folder with {TENSORS}")
    if path.stat().st_size > _MAX_ARTEFACT_BYTES:
        raise MechanismError(f"{NAME}: {TENSORS} is too large")
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise MechanismError(f"{NAME}: unreadable {TENSORS}: {error}") from None
    for name, array in state.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise MechanismError(f"{NAME}: artefact tensor {name} must be float32 and finite")
    return state
