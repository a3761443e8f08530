"""The mechanism ``textobfuscator`` (*reconstruction*): a token looks like its cluster.

Zhou et al., "TextObfuscator: making pre-trained language model a privacy protector via obfuscating
word representations", Findings of ACL 2023: representations are clustered round prototypes and get
random perturbations, so that a word cannot be told from others of its cluster. There the encoder is
trained until representations lie close to their prototypes. Here the bottom model is frozen, so the
limit of such training is taken instead: a token's row *is* its cluster's prototype, whatever the
context, and is shifted by a vector that is uniform in the ball with the cluster's radius.
Prototypes are k-means centres of the public bank's text entries.

A special token carries no text and is a cluster of its own without radius.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.bundle import Manifest
from privtune_flwr.privacy.artefact import read_tensors
from privtune_flwr.privacy.base import (
    Guarantee,
    Mechanism,
    MechanismError,
    MechanismSpec,
    Param,
    ParamReader,
    Strength,
)
from privtune_flwr.privacy.dchi import DIMENSION_RANGE, UNIT_RANGE, resolve_eta

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge, Tables

TENSORS = "textobfuscator.safetensors"
_VOCABULARY_RANGE = (2, 10_000_000)
_PROTOTYPE_RANGE = (1, 1_000_000)
_NAMES = ("clusters", "prototypes", "unit", "dimension", "vocabulary")
_BATCH = 4096


def sample_ball(
    rng: np.random.Generator, radius_T: NDArray[np.float64], dimension: int
) -> NDArray[np.float64]:
    """Draw a vector for each token, uniform in the ball of that token's radius, (T, d)."""
    # The share of a ball's volume within r is (r / R)^d.
    length_T = radius_T * rng.uniform(size=len(radius_T)) ** (1 / dimension)
    direction_TD = rng.standard_normal((len(radius_T), dimension))
    direction_TD *= (length_T / np.linalg.norm(direction_TD, axis=1))[:, None]
    return direction_TD


class TextObfuscator(Mechanism):
    """Replace each row by its token's prototype, shifted at random within the cluster.

    Parameters
    ----------
    spec : MechanismSpec
        Kept as received.
    cluster_V : int array, shape (V,)
        Each token's cluster.
    prototype_PD : float array, shape (P, d)
        Each cluster's prototype.
    radius_P : float array, shape (P,)
        Mean distance of the cluster's entries from it.
    """

    name: ClassVar[str] = "textobfuscator"
    additive: ClassVar[bool] = False

    def __init__(
        self,
        spec: MechanismSpec,
        *,
        cluster_V: NDArray[np.int32],
        prototype_PD: NDArray[np.float32],
        radius_P: NDArray[np.float32],
    ) -> None:
        super().__init__(spec)
        self.cluster_V = cluster_V
        self.prototype_PD = prototype_PD
        self.radius_P = radius_P

    @classmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Cluster the bank and write clusters, prototypes and radii as the artefact.

        ``siblings.clusters`` alone sets the strength; ``privacy.noise`` is not used.

        Raises
        ------
        MechanismError
            If ``privacy.eta`` is set, which this mechanism has none of.
        """
        from safetensors.numpy import save_file

        if config.eta > 0:
            raise MechanismError(f"{cls.name}: has no eta; set privacy.siblings.clusters instead")
        _, unit = resolve_eta(config, public)
        clusters = config.siblings.clusters
        tables = public.cached(
            "textobfuscator", {"clusters": clusters}, lambda: _tables(public, clusters)
        )
        save_file({name: np.array(table) for name, table in tables.items()}, folder / TENSORS)
        prototypes, dimension = tables["prototype"].shape
        params: dict[str, Param] = {
            "clusters": clusters,
            "prototypes": prototypes,
            "unit": unit,
            "dimension": dimension,
            "vocabulary": public.vocab_size,
        }
        return MechanismSpec(cls.name, params, Manifest.of(folder).id)

    @classmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism from what the cloud sent."""
        reader = ParamReader(spec, _NAMES)
        reader.real("unit", *UNIT_RANGE)
        reader.integer("clusters", *_PROTOTYPE_RANGE)
        prototypes = reader.integer("prototypes", *_PROTOTYPE_RANGE)
        vocabulary = reader.integer("vocabulary", *_VOCABULARY_RANGE)
        dimension = reader.integer("dimension", *DIMENSION_RANGE)
        tensors = read_tensors(
            cls.name,
            artefact,
            TENSORS,
            {
                "cluster": (np.int32, (vocabulary,)),
                "prototype": (np.float32, (prototypes, dimension)),
                "radius": (np.float32, (prototypes,)),
            },
        )
        cluster_V, radius_P = tensors["cluster"], tensors["radius"]
        if cluster_V.min() < 0 or cluster_V.max() >= prototypes:
            raise MechanismError(f"{cls.name}.prototypes = {prototypes}: a cluster lies outside")
        if radius_P.min() < 0:
            raise MechanismError(f"{cls.name}: a radius of the artefact is negative")
        return cls(spec, cluster_V=cluster_V, prototype_PD=tensors["prototype"], radius_P=radius_P)

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Bound the bits by the number of prototypes that the specification names."""
        prototypes = ParamReader(spec, _NAMES).integer("prototypes", *_PROTOTYPE_RANGE)
        return Strength(bits=math.log2(prototypes))

    @property
    def eta_max(self) -> None:
        """None: two tokens of different clusters are simply told apart."""
        return None

    @property
    def strength(self) -> Strength:
        """Bits: the law of a row depends on the cluster alone, so it cannot tell more than that."""
        return Strength(bits=math.log2(len(self.prototype_PD)))

    def guarantee(self) -> Guarantee:
        """Say that there is none between clusters, and what holds within one."""
        size_P = np.bincount(self.cluster_V, minlength=len(self.prototype_PD))
        alone = int((size_P == 1).sum())
        return Guarantee(
            metric="none: tokens of one cluster, or not",
            adversary="one who does not know the prototypes; but they are public, and whoever "
            "knows them reads the cluster off a released row and guesses the word from the "
            "cluster, its neighbours and how common its words are",
            eta=None,
            statement=f"No formal protection between tokens of different clusters. Released rows "
            "of two tokens of one cluster have the same law, whatever the context, so that a row "
            f"tells at most which of {len(self.prototype_PD)} clusters it is of "
            f"({self.strength.bits:.4g} bits); {alone} of them hold a single token, which is told "
            "outright. The random shift adds nothing to that: it is made from the cluster alone. "
            "Sequences of clusters tell more than single ones, since text is redundant. The cloud "
            "supplies the clusters; the device checks their number, not how they were made.",
        )

    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        dimension, vocabulary = self.prototype_PD.shape[1], len(self.cluster_V)
        if hidden_TD.shape[1] != dimension:
            raise MechanismError(
                f"{self.name}.dimension = {dimension}: the representations have "
                f"{hidden_TD.shape[1]}"
            )
        if len(ids_T) and (ids_T.min() < 0 or ids_T.max() >= vocabulary):
            raise MechanismError(
                f"{self.name}.vocabulary = {vocabulary}: a token id lies outside it"
            )
        cluster_T = self.cluster_V[ids_T]
        shift_TD = sample_ball(rng, self.radius_P[cluster_T].astype(np.float64), dimension)
        return self.prototype_PD[cluster_T].astype(np.float64) + shift_TD


def _tables(public: PublicKnowledge, clusters: int) -> Tables:
    """Cluster the text entries; common ones weigh more, by the logarithm of their count."""
    from sklearn.cluster import MiniBatchKMeans

    text, special = public.text_ids, public.special_ids
    rows_ND = np.ascontiguousarray(public.bank[text])
    weight_N = 1 + np.log1p(public.counts[text])
    if clusters < len(text):
        model = MiniBatchKMeans(clusters, batch_size=_BATCH, n_init=1, random_state=0)
        found_N = model.fit_predict(rows_ND, sample_weight=weight_N)
    else:
        found_N = np.arange(len(text))
    # Empty clusters are dropped, so that the number of prototypes is the true one.
    _, label_N = np.unique(found_N, return_inverse=True)
    count = int(label_N.max()) + 1
    bank_ND = rows_ND.astype(np.float64)
    # Mini-batches leave centres that are only nearly the means of their members.
    centre_KD = np.zeros((count, bank_ND.shape[1]))
    np.add.at(centre_KD, label_N, bank_ND * weight_N[:, None])
    centre_KD /= np.bincount(label_N, weights=weight_N)[:, None]
    distance_N = np.linalg.norm(bank_ND - centre_KD[label_N], axis=1)
    size_K = np.bincount(label_N)
    # A single member is its prototype; rounding must not give it a radius.
    radius_K = np.where(size_K > 1, np.bincount(label_N, weights=distance_N) / size_K, 0.0)

    cluster_V = np.empty(public.vocab_size, dtype=np.int32)
    cluster_V[text] = label_N
    cluster_V[special] = count + np.arange(len(special))
    return {
        "cluster": cluster_V,
        "prototype": np.concatenate([centre_KD, public.bank[special]]).astype(np.float32),
        "radius": np.concatenate([radius_K, np.zeros(len(special))]).astype(np.float32),
    }
