"""What every attack on an update is given, and what it gives back.

Legend: V vocabulary, T tokens of a sentence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.audit.tokens import content_mask, special_mask
from privtune_flwr.federated.whole import WholeModel
from privtune_flwr.privacy.learning import State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DRAWS = 20


@dataclass(frozen=True)
class Update:
    """One device's answer to one round, as the cloud holds it.

    Attributes
    ----------
    sent, received : dict of float32 arrays
        What is trained, before and after, by name.
    examples : int
        As the device said.
    round, rounds : int
        From 1, and how many there are: they place the round in the schedule.
    """

    sent: State
    received: State
    examples: int
    round: int = 1
    rounds: int = 1

    def change(self, name: str) -> NDArray[np.float64]:
        """Give one array's change."""
        found: NDArray[np.float64] = self.received[name].astype(np.float64) - self.sent[name]
        return found


@dataclass
class CloudKnowledge:
    """What the cloud knows beside the update.

    Attributes
    ----------
    model : WholeModel
        The pretrained model with the run's settings; attacks load the sent state into it.
    public : sequence of int arrays (T,)
        Public text as token ids, special ones included.
    """

    model: WholeModel
    public: Sequence[NDArray[Any]]
    _expected: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        found: PreTrainedTokenizerBase = self.model.parts.tokenizer
        return found

    @property
    def vocabulary(self) -> int:
        """V, the rows of the embedding table."""
        return self.model.bottom.vocab_size

    @cached_property
    def is_text(self) -> NDArray[np.bool_]:
        """Which entries are no special tokens."""
        return ~special_mask(self.tokenizer, self.vocabulary)

    @cached_property
    def is_content(self) -> NDArray[np.bool_]:
        """Which entries are content words."""
        return content_mask(self.tokenizer, self.vocabulary)

    @cached_property
    def commonest(self) -> NDArray[np.int64]:
        """All entries but special ones, the public text's commonest first."""
        ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in self.public])
        counts_V = np.bincount(ids, minlength=self.vocabulary)[: self.vocabulary]
        order = np.argsort(-counts_V, kind="stable")
        return order[self.is_text[order]]

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a public sentence on average, special ones included."""
        return float(np.mean([len(s) for s in self.public]))

    def expected(self, examples: int) -> tuple[int, int]:
        """Say how many distinct tokens, and content words, so many public sentences have.

        The cloud knows how many sentences a device has: so many guesses are worth making where an
        attack cannot tell by itself where to stop.
        """
        if examples not in self._expected:
            rng = np.random.default_rng(0)
            found = []
            for _ in range(_DRAWS):
                drawn = rng.choice(len(self.public), size=examples, replace=True)
                distinct = np.unique(np.concatenate([self.public[int(i)] for i in drawn]))
                found.append((self.is_text[distinct].sum(), self.is_content[distinct].sum()))
            both = np.maximum(1, np.mean(found, axis=0).round()).astype(int)
            self._expected[examples] = int(both[0]), int(both[1])
        return self._expected[examples]


@dataclass(frozen=True)
class Reading:
    """What an attack read.

    Attributes
    ----------
    tokens : int array
        Distinct tokens that it says are in the text, surest first; no special ones.
    sentences : sequence of int arrays (T,)
        Whole sentences, special tokens included; empty if it rebuilds none.
    said : str
        How it came about, for people; tells no text.
    """

    tokens: NDArray[np.int64]
    sentences: Sequence[NDArray[np.int64]] = ()
    said: str = ""


NOTHING = np.zeros(0, dtype=np.int64)


class UpdateAttack(ABC):
    """Reads a device's text from its update."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, update: Update, knowledge: CloudKnowledge) -> str:
        """Say why it cannot be tried on such an update; empty if it can."""

    @abstractmethod
    def read(self, update: Update, knowledge: CloudKnowledge) -> Reading:
        """Attack one update."""
