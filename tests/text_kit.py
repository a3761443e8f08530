"""A toy vocabulary with stop words, and what its replaced tokens are held against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from privacy_toy import CLS, PAD, SEP, VOCABULARY, ToyBottom, ToyTokenizer
from scipy import stats

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.mechanism_config import TextSection
from privtune_flwr.privacy.base import MechanismSpec
from privtune_flwr.privacy.keyed import keyed_generator
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism, mechanism_class
from privtune_flwr.privacy.text.base import TokenRewrite

NAMES = ("santext+", "custext+", "rantext", "rapt")
SPECIAL = np.array([CLS, SEP, PAD])
TEXT = np.arange(3, VOCABULARY)
STOPS = {5: "the", 9: "and", 30: "of"}
DRAWS = 20_000
REJECT = 1e-4
Sampler = Callable[[int, np.random.Generator], NDArray[np.int64]]


class SpellingTokenizer(ToyTokenizer):
    """A toy whose entries 5, 9 and 30 are stop words."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [STOPS.get(i, f"w{i}") for i in ids]


class TableBottom(ToyBottom):
    """A toy that shows its table and its tokenizer, as the real bottom model does."""

    tokenizer = SpellingTokenizer()

    @property
    def embedding_table(self) -> NDArray[np.float32]:
        return self.table


def skewed_texts() -> list[str]:
    """Entry 3 is the most frequent, 40 the rarest seen; 41 to 59 never occur."""
    return [" ".join(f"w{i}" for i in range(3, last)) for last in range(4, 42)]


def make_toy(folder: Path) -> PublicKnowledge:
    tokenizer: Any = SpellingTokenizer()
    return PublicKnowledge(
        TableBottom(), tokenizer, skewed_texts(), folder / "cache", bottom_id="t", max_length=60
    )


def design(
    name: str, public: PublicKnowledge, folder: Path, **changes: Any
) -> tuple[MechanismSpec, Path]:
    own = {key: changes.pop(key) for key in ("eta", "noise") if key in changes}
    config = PrivacyConfig(mechanism=name, text=TextSection(**changes), **own)
    folder.mkdir(exist_ok=True)
    return mechanism_class(name).design(config, public, folder), folder


def build(name: str, public: PublicKnowledge, folder: Path, **changes: Any) -> Any:
    return create_mechanism(*design(name, public, folder, **changes), TableBottom())


def _rng(*identity: int) -> np.random.Generator:
    return keyed_generator(bytes(32), "text", *identity)


def p_value(outputs_N: NDArray[np.int64], law_V: NDArray[np.float64]) -> float:
    """Chi-square of draws against probabilities; rare outcomes together, impossible ones fatal."""
    counts = np.bincount(outputs_N, minlength=len(law_V))
    if counts[law_V <= 0].any():
        return 0.0
    expected = law_V * len(outputs_N)
    rare = expected < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 10:  # too rare even together: their excess shows in the others
        if observed[-1] > 40:
            return 0.0
        observed, wanted = observed[:-1], wanted[:-1]
    if len(observed) < 2:
        return 1.0
    return float(stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue)


def ours(mechanism: TokenRewrite) -> Sampler:
    return lambda token, rng: mechanism.rewrite(np.full(DRAWS, token), rng)


def exponential_law(scores_V: NDArray[np.float64], allowed_V: NDArray[np.bool_]) -> Any:
    weights = np.where(allowed_V, np.exp(scores_V - scores_V[allowed_V].max()), 0.0)
    return weights / weights.sum()


def half_table() -> NDArray[np.float64]:
    return ToyBottom().table.astype(np.float16).astype(np.float64)


def distances(token: int) -> NDArray[np.float64]:
    table = half_table()
    return np.asarray(np.linalg.norm(table - table[token], axis=1))
