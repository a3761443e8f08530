"""The mechanism ``santext+``: sensitive tokens are replaced by sensitive tokens near them.

Yue et al., "Differential Privacy for Text Analytics via Natural Text Sanitization", Findings of ACL
2021. The rarest share of the vocabulary is sensitive. A sensitive token x becomes a sensitive token
y with P(y | x) proportional to exp(-epsilon d(x, y) / 2), d Euclidean; another token is treated the
same way with probability p and stays as it is otherwise. A share of 1 is plain SanText.

Rarity is counted in *public* text; counting it in the private text, as public code does, tells
which words the private text has. Entries are wordpieces, see
:mod:`~privtune_flwr.privacy.text.vectors`.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import Guarantee, MechanismError, MechanismSpec, Param, ParamReader
from privtune_flwr.privacy.dchi import ETA_RANGE
from privtune_flwr.privacy.text.base import (
    COMMON,
    IMPOSSIBLE,
    VOCABULARY_RANGE,
    RowChannel,
    VectorRewrite,
    channel_blocks,
    draw_by_weight,
    read_vectors,
    token_blocks,
    write_vectors,
)
from privtune_flwr.privacy.text.vectors import Vectors, public_vectors

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge


class SanText(VectorRewrite):
    """Exponential mechanism over the sensitive tokens, in the metric of the input embeddings.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    eta : float
        epsilon of the paper, per unit of distance.
    replace : float
        p: how often a token that is not sensitive is replaced.
    sensitive_V : bool array, shape (V,)
        Which tokens are sensitive.
    special_S, table_VD
        See :class:`~privtune_flwr.privacy.text.base.VectorRewrite`.
    """

    name: ClassVar[str] = "santext+"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        eta: float,
        replace: float,
        sensitive_V: NDArray[np.bool_],
        special_S: NDArray[np.int64],
        table_VD: NDArray[np.float16],
    ) -> None:
        super().__init__(spec, special_S=special_S, table_VD=table_VD)
        self.eta = eta
        self.replace = replace
        self.sensitive_V = sensitive_V

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Call the rarest entries of the public text sensitive; ties go by id."""
        vectors, unit = public_vectors(public)
        text = public.text_ids
        rarest_first = text[np.argsort(public.counts[text], kind="stable")]
        sensitive_V = np.zeros(len(vectors), dtype=np.uint8)
        sensitive_V[rarest_first[: _count(config.text.sensitive, len(text))]] = 1
        params: dict[str, Param] = {
            "eta": config.text.epsilon,
            "sensitive": config.text.sensitive,
            "replace": config.text.replace,
        }
        return write_vectors(
            cls.name,
            folder,
            params,
            public=public,
            vectors=vectors,
            unit=unit,
            sensitive=sensitive_V,
        )

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; as many tokens must be sensitive as the specification says."""
        reader = ParamReader(spec, (*COMMON, "dimension", "eta", "sensitive", "replace"))
        share = reader.real("sensitive", 1e-6, 1)
        replace = reader.real("replace", 1e-6, 1)
        eta = reader.real("eta", *ETA_RANGE)
        vocabulary = reader.integer("vocabulary", *VOCABULARY_RANGE)
        wanted = {"sensitive": (np.uint8, (vocabulary,))}
        tensors = read_vectors(reader, cls.name, artefact, wanted)
        sensitive_V, special_S = tensors["sensitive"], tensors["special"]
        needed = _count(share, len(sensitive_V) - len(special_S))
        if sensitive_V.max() > 1 or sensitive_V[special_S].any() or sensitive_V.sum() != needed:
            raise MechanismError(
                f"{cls.name}: artefact tensor 'sensitive' must mark {needed} text entries"
            )
        return cls(
            spec,
            eta=eta,
            replace=replace,
            sensitive_V=sensitive_V.astype(np.bool_),
            special_S=special_S,
            table_VD=tensors["vectors"],
        )

    @property
    def eta_max(self) -> float:
        """That of two tokens of one kind; see :meth:`guarantee` for what it leaves out."""
        return self.eta

    def guarantee(self) -> Guarantee:
        """State metric privacy of sensitive tokens, and what is left for the others."""
        count, rest = int(self.sensitive_V.sum()), int((self.text_V & ~self.sensitive_V).sum())
        return Guarantee(
            metric="Euclidean distance of two entries of the input embedding table (float16)",
            adversary="knows everything but the device's secret, the sensitive tokens included",
            eta=self.eta,
            statement=f"{count} tokens are sensitive. Between two of them, the probabilities of "
            f"any released token differ by a factor of at most exp({self.eta:.6g} * distance). "
            f"For the {rest} others this holds for sensitive outputs only: between two of them "
            "with the same factor, between one of them and a sensitive token with that factor "
            f"times {1 / self.replace:.6g} (1/p). With probability {1 - self.replace:.6g} one of "
            "them is released as it is, and whoever sees it knows that: no bound at all. A token "
            "is a vocabulary entry, a piece of a word. It composes over tokens and releases; "
            "lengths, order and special tokens are released as they are. What is sensitive was "
            "chosen by the cloud; the device checks how many, not which. It holds for real "
            "arithmetic and ideal randomness; here: float64 and ChaCha20.",
        )

    def _draw(self, ids_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        coin_N, uniform_N = rng.random((2, len(ids_N)))
        replaced_N = self.sensitive_V[ids_N] | (coin_N < self.replace)
        new_N = ids_N.copy()
        place = np.flatnonzero(replaced_N)
        for part in token_blocks(place):
            at = place[part]
            log_weights = self.vectors.distances(ids_N[at]) * (-self.eta / 2)
            log_weights[:, ~self.sensitive_V] = -np.inf
            new_N[at] = draw_by_weight(log_weights, uniform_N[at])
        return new_N

    def _new_channel(self) -> RowChannel:
        return SanTextChannel(self.vectors, self.sensitive_V, self.eta, self.replace)


class SanTextChannel(RowChannel):
    """The exact law; normalisers of all entries are computed when first needed.

    They are no part of the artefact: a device sums its own row anyway, and need not trust them.
    """

    def __init__(
        self, vectors: Vectors, sensitive_V: NDArray[np.bool_], eta: float, replace: float
    ) -> None:
        super().__init__(vectors.text_V)
        self._vectors = vectors
        self._sensitive_V = sensitive_V
        self._eta = eta
        self._replace = replace

    @cached_property
    def _log_normalisers(self) -> NDArray[np.float64]:
        """Of each entry, (V,)."""
        found = np.empty(len(self._vectors))
        for block in channel_blocks(len(self._vectors)):
            scores = self._vectors.distances(block, np.float32)[:, self._sensitive_V]
            scores *= -self._eta / 2
            top = scores.max(axis=1, keepdims=True)
            found[block] = np.log(np.exp(scores - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
        return found

    def _rows(self, outputs_U: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        rows = self._vectors.distances(outputs_U) * (-self._eta / 2) - self._log_normalisers
        rows += np.where(self._sensitive_V, 0.0, math.log(self._replace))
        own = np.flatnonzero(~self._sensitive_V[outputs_U])
        rows[own] = IMPOSSIBLE
        if self._replace < 1:
            rows[own, outputs_U[own]] = math.log1p(-self._replace)
        return rows


def _count(share: float, entries: int) -> int:
    return max(1, min(entries, math.ceil(share * entries)))
