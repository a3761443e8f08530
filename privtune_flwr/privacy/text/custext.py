"""The mechanism ``custext+``: a token is replaced within its own small set of near tokens.

Chen et al., "A Customized Text Sanitization Mechanism with Differential Privacy", Findings of ACL
2023. The vocabulary is divided into sets of K tokens: the most frequent token that is in none yet,
with the K - 1 nearest of those that are in none. All tokens of a set share it as their output set.
A token x becomes y of its set with P(y | x) proportional to exp(epsilon u(x, y) / 2), where u is
one less the Euclidean distance, scaled so that x's set spans [0, 1]: its sensitivity is 1. Stop
words may be drawn but stay as they are where they occur ("+").

This is the paper's mapping, in which tokens that share an output share the whole set; a set of the
K nearest for each token on its own, which public code also has, keeps no epsilon: its neighbours
have other sets. Frequency is counted in public text (public code counts the private one). Entries
are wordpieces; a stop word is an entry that spells one of scikit-learn's English stop words,
wherever it stands. What the last full set leaves over joins that set.

Shapes: ``V`` vocabulary, ``G`` sets, ``W`` tokens of the largest set.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import (
    Guarantee,
    MechanismError,
    MechanismSpec,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.text.base import (
    COMMON,
    EPSILON_RANGE,
    IMPOSSIBLE,
    VOCABULARY_RANGE,
    RowChannel,
    TokenRewrite,
    draw_by_weight,
    read_artefact,
    write_artefact,
)
from privtune_flwr.privacy.text.vectors import Vectors, public_vectors

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

CANDIDATES_RANGE = (2, 1000)
_SHRINK_EVERY = 64


class CusText(TokenRewrite):
    """Exponential mechanism over a token's output set.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    epsilon : float
        Of one token.
    members_GW : int64 array, shape (G, W)
        Tokens of each set, rising, filled up with -1.
    set_V : int array, shape (V,)
        Each token's set; -1 for special tokens.
    utility_VW : float16 array, shape (V, W)
        u of the members of the token's own set, in [0, 1].
    kept_V : bool array, shape (V,)
        Stop words.
    special_S : int64 array, shape (S,)
        Entries that are no text.
    """

    name: ClassVar[str] = "custext+"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        epsilon: float,
        members_GW: NDArray[np.int64],
        set_V: NDArray[np.int32],
        utility_VW: NDArray[np.float16],
        kept_V: NDArray[np.bool_],
        special_S: NDArray[np.int64],
    ) -> None:
        super().__init__(spec, special_S=special_S, vocabulary=len(set_V))
        self.epsilon = epsilon
        self.members_GW = members_GW
        self.set_V = set_V
        self.kept_V = kept_V
        self._utility_VW = utility_VW

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Divide the vocabulary and scale the utilities; cached with the public knowledge."""
        vectors, unit = public_vectors(public)
        size = config.text.candidates
        tables = public.cached(
            "custext", {"candidates": size}, lambda: _tables(vectors, public, size)
        )
        params: dict[str, str | int | float] = {
            "epsilon": config.text.epsilon,
            "candidates": size,
            "width": tables["utility"].shape[1],
            "unit": unit,
            "vocabulary": len(vectors),
            "special": len(public.special_ids),
        }
        kept_V = np.zeros(len(vectors), dtype=np.uint8)
        kept_V[stop_entries(public.tokenizer, public.text_ids)] = 1
        tensors: dict[str, NDArray[Any]] = {
            "special": public.special_ids,
            "kept": kept_V,
            "set": np.array(tables["set"]),
            "utility": np.array(tables["utility"]),
        }
        return write_artefact(cls.name, folder, params, tensors)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism: whatever sets come, none is small and no utility leaves [0, 1]."""
        reader = ParamReader(spec, (*COMMON, "epsilon", "candidates", "width"))
        epsilon = reader.real("epsilon", *EPSILON_RANGE)
        size = reader.integer("candidates", *CANDIDATES_RANGE)
        width = reader.integer("width", 2, 2 * size - 1)
        vocabulary = reader.integer("vocabulary", *VOCABULARY_RANGE)
        tensors = read_artefact(
            reader,
            cls.name,
            artefact,
            {
                "kept": (np.uint8, (vocabulary,)),
                "set": (np.int32, (vocabulary,)),
                "utility": (np.float16, (vocabulary, width)),
            },
        )
        set_V, kept_V, special_S = tensors["set"], tensors["kept"], tensors["special"]
        if kept_V.max() > 1 or kept_V[special_S].any():
            raise MechanismError(f"{cls.name}: artefact tensor 'kept' must mark text entries")
        if tensors["utility"].min() < 0 or tensors["utility"].max() > 1:
            raise MechanismError(f"{cls.name}: a utility of the artefact lies outside 0 to 1")
        return cls(
            spec,
            epsilon=epsilon,
            members_GW=_members(set_V, special_S, size, width),
            set_V=set_V,
            utility_VW=tensors["utility"],
            kept_V=kept_V.astype(np.bool_),
            special_S=special_S,
        )

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Say epsilon as the specification does."""
        epsilon = spec.params.get("epsilon")
        return Strength(epsilon=float(epsilon) if isinstance(epsilon, int | float) else None)

    @property
    def strength(self) -> Strength:
        """Epsilon of one token among those of its set; :meth:`guarantee` says what that omits."""
        return Strength(epsilon=self.epsilon)

    @property
    def eta_max(self) -> None:
        """None: the promise is about sets, not about a distance."""
        return None

    def guarantee(self) -> Guarantee:
        """State local differential privacy inside a set, and nothing outside."""
        return Guarantee(
            metric="same output set",
            adversary="knows everything but the device's secret, the sets included",
            eta=None,
            statement=f"Between two tokens of one output set that are no stop words, the "
            f"probabilities of any released token differ by a factor of at most "
            f"exp({self.epsilon:.6g}). There are {len(self.members_GW)} sets that share no token: "
            "the set of each token is released for certain. The "
            f"{int(self.kept_V.sum())} stop words are released as they are; a released token that "
            "is no stop word was none. It composes over tokens and releases; lengths, order and "
            "special tokens are released as they are. A token is a vocabulary entry, a piece of a "
            "word. Which tokens share a set was chosen by the cloud; the device checks that the "
            "sets cover the vocabulary once, that none is small, and that the utilities lie in "
            "0 to 1, from which epsilon follows. It holds for real arithmetic and ideal "
            "randomness; here: float64 and ChaCha20.",
        )

    def _check_tokenizer(self, tokenizer: Any) -> None:
        super()._check_tokenizer(tokenizer)
        kept = np.flatnonzero(self.kept_V)
        if len(stop_entries(tokenizer, kept)) != len(kept):
            raise MechanismError(f"{self.name}: the artefact keeps tokens that are no stop words")

    def log_weights(self, ids_N: NDArray[np.int64]) -> NDArray[np.float64]:
        """Give epsilon u / 2 over each token's set, (N, W); -inf where it has no such member."""
        scores_NW = self._utility_VW[ids_N].astype(np.float64) * (self.epsilon / 2)
        scores_NW[self.members_GW[self.set_V[ids_N]] < 0] = -np.inf
        return scores_NW

    def _draw(self, ids_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        place_N = draw_by_weight(self.log_weights(ids_N), rng.random(len(ids_N)))
        return np.where(self.kept_V[ids_N], ids_N, self.members_GW[self.set_V[ids_N], place_N])

    def _new_channel(self) -> RowChannel:
        return CusTextChannel(self)


class CusTextChannel(RowChannel):
    """The exact law."""

    def __init__(self, mechanism: CusText) -> None:
        super().__init__(mechanism.text_V)
        self._mechanism = mechanism

    def _rows(self, outputs_U: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        mechanism = self._mechanism
        rows = np.full((len(outputs_U), mechanism.vocabulary), IMPOSSIBLE)
        for row, output in zip(rows, outputs_U, strict=True):
            members_W = mechanism.members_GW[mechanism.set_V[output]]
            members = members_W[members_W >= 0]
            weights = mechanism.log_weights(members)
            log_law = weights - np.logaddexp.reduce(weights, axis=1, keepdims=True)
            column = log_law[:, np.searchsorted(members, output)]
            row[members] = np.where(mechanism.kept_V[members], IMPOSSIBLE, column)
            if mechanism.kept_V[output]:
                row[output] = 0.0
        return rows


def stop_entries(tokenizer: Any, ids_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """List those of some entries that spell an English stop word."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    spelled = tokenizer.convert_ids_to_tokens([int(i) for i in ids_N])
    # the marks with which byte-level and unigram vocabularies begin a word
    stops = [str(s).lstrip("Ġ▁").lower() in ENGLISH_STOP_WORDS for s in spelled]
    return ids_N[np.array(stops, dtype=np.bool_)]


def divide(vectors: Vectors, order_N: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    """Divide the text entries into sets of ``size`` near ones.

    Parameters
    ----------
    vectors : Vectors
        Where entries lie.
    order_N : int64 array
        All text entries, in the order in which they may found a set.
    size : int
        K.

    Returns
    -------
    int32 array, shape (V,)
        Number of each entry's set; -1 for special entries.
    """
    set_V = np.full(len(vectors), -1, dtype=np.int32)
    table_VD, squares_V = vectors.wide(np.float32)
    free, count = np.sort(order_N), 0
    table_ND = table_VD[free]
    open_N = np.ones(len(free), dtype=np.bool_)
    left = len(free)
    for founder in order_N:
        if left < size:
            break
        if set_V[founder] >= 0:
            continue
        # squared distance less the founder's own norm: the same order, one product
        closeness = squares_V[free] - 2 * (table_ND @ table_VD[founder])
        closeness[~open_N] = np.inf
        closeness[np.searchsorted(free, founder)] = -np.inf
        chosen = np.argpartition(closeness, size - 1)[:size]
        set_V[free[chosen]] = count
        open_N[chosen] = False
        left -= size
        count += 1
        if count % _SHRINK_EVERY == 0:
            free, table_ND = free[open_N], table_ND[open_N]
            open_N = np.ones(len(free), dtype=np.bool_)
    set_V[free[open_N]] = max(count - 1, 0)
    return set_V


def _tables(vectors: Vectors, public: PublicKnowledge, size: int) -> dict[str, NDArray[np.generic]]:
    text = public.text_ids
    order_N = text[np.argsort(-public.counts[text], kind="stable")]
    set_V = divide(vectors, order_N, size)
    width = int(np.bincount(set_V[text]).max())
    members_GW = _members(set_V, public.special_ids, size, width)
    table_VD, _ = vectors.wide()
    utility_VW = np.zeros((len(vectors), width), dtype=np.float16)
    for members_W in members_GW:
        members = members_W[members_W >= 0]
        gap = table_VD[members][:, None] - table_VD[members]
        distance = np.sqrt(np.einsum("ijd,ijd->ij", gap, gap))
        farthest = distance.max(axis=1, keepdims=True)
        scaled = np.divide(distance, farthest, out=np.zeros_like(distance), where=farthest > 0)
        utility_VW[members, : len(members)] = 1 - scaled
    return {"set": set_V, "utility": utility_VW}


def _members(
    set_V: NDArray[np.int32], special_S: NDArray[np.int64], size: int, width: int
) -> NDArray[np.int64]:
    """List the sets, and refuse any that is too small or too large, or holds a special token."""
    text = np.setdiff1d(np.arange(len(set_V)), special_S)
    sets = set_V[text]
    if (set_V[special_S] != -1).any() or sets.min() < 0 or sets.max() >= len(text):
        raise MechanismError(f"{CusText.name}: each text entry must be in one output set")
    sizes = np.bincount(sets)
    if sizes.min() < min(size, len(text)) or sizes.max() > width:
        raise MechanismError(
            f"{CusText.name}: an output set has not {min(size, len(text))} to {width} tokens"
        )
    order = np.argsort(sets, kind="stable")
    column = np.arange(len(text)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members_GW = np.full((len(sizes), width), -1, dtype=np.int64)
    members_GW[sets[order], column] = text[order]
    return members_GW
