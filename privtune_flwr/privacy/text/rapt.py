"""The mechanism ``rapt``: d_chi noise on a token's embedding, then the nearest token.

Li et al., "Privacy-Preserving Prompt Tuning for Large Language Model Services", 2023: text-to-text
privatisation after Feyisetan et al., WSDM 2020. The embedding gets noise with density proportional
to exp(-eta ||z||), and the token becomes the entry nearest to the result. The other half of RAPT,
training the cloud's model to reconstruct privatised public tokens beside its task, belongs to the
cloud: ``recovery.adapt``.

eta is ``privacy.eta`` or follows from ``privacy.noise`` in units of the embedding table, as for
``dchi``. In many dimensions little happens until the noise is several units, and then everything
does: the nearest entry is the token itself, or one that has nothing to do with it. Entries are
wordpieces.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.base import Guarantee, MechanismSpec, Param, ParamReader
from privtune_flwr.privacy.dchi import ETA_RANGE, sample_dchi
from privtune_flwr.privacy.text.base import (
    COMMON,
    RowChannel,
    VectorRewrite,
    channel_blocks,
    read_vectors,
    token_blocks,
    write_vectors,
)
from privtune_flwr.privacy.text.vectors import Vectors, public_vectors

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

_ENTRY_PAIRS = 3e10  # pairs times draws that a channel may cost: a minute on one core


class RAPT(VectorRewrite):
    """Move a token's embedding at random, then take the nearest entry.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    eta : float
        Inverse length.
    special_S, table_VD
        See :class:`~privtune_flwr.privacy.text.base.VectorRewrite`.
    """

    name: ClassVar[str] = "rapt"

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        eta: float,
        special_S: NDArray[np.int64],
        table_VD: NDArray[np.float16],
    ) -> None:
        super().__init__(spec, special_S=special_S, table_VD=table_VD)
        self.eta = eta

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Resolve eta; the vectors are the artefact."""
        vectors, unit = public_vectors(public)
        eta = config.eta if config.eta > 0 else vectors.dimension / (config.noise * unit)
        params: dict[str, Param] = {"eta": float(eta)}
        return write_vectors(cls.name, folder, params, public=public, vectors=vectors, unit=unit)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from what the cloud sent."""
        reader = ParamReader(spec, (*COMMON, "dimension", "eta"))
        eta = reader.real("eta", *ETA_RANGE)
        tensors = read_vectors(reader, cls.name, artefact)
        return cls(spec, eta=eta, special_S=tensors["special"], table_VD=tensors["vectors"])

    @property
    def eta_max(self) -> float:
        """The one eta of all tokens."""
        return self.eta

    def guarantee(self) -> Guarantee:
        """State d_chi-privacy of a token in the embedding table."""
        return Guarantee(
            metric="Euclidean distance of two entries of the input embedding table (float16)",
            adversary="knows everything but the device's secret",
            eta=self.eta,
            statement="Between any two tokens, the probabilities of any released token differ by "
            f"a factor of at most exp({self.eta:.6g} * distance): taking the nearest entry is "
            "post-processing of d_chi noise. It composes over tokens and releases; lengths, order "
            "and special tokens are released as they are. A token is a vocabulary entry, a piece "
            "of a word. It holds for real arithmetic and ideal randomness; here: float64 and "
            "ChaCha20.",
        )

    def _draw(self, ids_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        table_VD, squares_V = self.vectors.wide()
        noise_ND = sample_dchi(rng, len(ids_N), self.vectors.dimension, self.eta)
        new_N = ids_N.copy()
        for part in token_blocks(ids_N):
            points = table_VD[ids_N[part]] + noise_ND[part]
            gap = squares_V - 2 * (points @ table_VD.T)
            gap[:, ~self.text_V] = np.inf
            new_N[part] = gap.argmin(axis=1)
        return new_N

    def _new_channel(self) -> RowChannel:
        return RAPTChannel(self.vectors, self.eta)


class RAPTChannel(RowChannel):
    """An estimate of the law, which has no closed form.

    M noise vectors at a fixed public seed, the same for every entry, give M outputs of each entry;
    one more pseudo-draw is spread over all outputs by a kernel,

        P(y | v) = (draws of v that gave y + K(y | v)) / (M + 1),

    K proportional to exp(-d^2 / (8 s^2)), s = sqrt(d) / eta: how fast the chance that y alone beats
    v falls with their distance in many dimensions, where noise is nearly Gaussian with standard
    deviation s a coordinate. M depends on the vocabulary: 20,000 for a toy, 32 for 30,522 entries,
    where rare outputs rest on the kernel.
    """

    def __init__(self, vectors: Vectors, eta: float) -> None:
        super().__init__(vectors.text_V)
        self._vectors = vectors
        self._eta = eta
        self.draws = int(np.clip(_ENTRY_PAIRS / len(vectors) ** 2, 8, 20_000))
        self._rate = eta**2 / (8 * vectors.dimension)

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Outputs of the draws (V, M) and log-normalisers of the kernel (V,)."""
        table_VD, squares_V = self._vectors.wide(np.float32)
        noise_MD = sample_dchi(
            np.random.default_rng(0), self.draws, self._vectors.dimension, self._eta
        ).astype(np.float32)
        pull_MV = noise_MD @ table_VD.T
        outputs_VM = np.empty((len(self._vectors), self.draws), dtype=np.int32)
        log_normaliser_V = np.empty(len(self._vectors))
        barred = np.where(self.text_V, 0.0, -np.inf).astype(np.float32)
        for block in channel_blocks(len(self._vectors)):
            closeness = table_VD[block] @ table_VD.T - squares_V / 2 + barred
            for m, pull_V in enumerate(pull_MV):
                outputs_VM[block, m] = (closeness + pull_V).argmax(axis=1)
            log_kernel = -self._rate * self._vectors.distances(block, np.float32) ** 2 + barred
            top = log_kernel.max(axis=1, keepdims=True)
            summed = np.exp(log_kernel - top).sum(axis=1, dtype=np.float64)
            log_normaliser_V[block] = np.log(summed) + top[:, 0]
        return outputs_VM, log_normaliser_V

    def _rows(self, outputs_U: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        outputs_VM, log_normaliser_V = self._tables
        rows = -self._rate * self._vectors.distances(outputs_U) ** 2 - log_normaliser_V
        np.exp(rows, out=rows)
        for row, output in zip(rows, outputs_U, strict=True):
            row += (outputs_VM == output).sum(axis=1)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(rows / (self.draws + 1)))
