"""What a privacy mechanism is: designed in the cloud, loaded and applied on the device.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary, ``C`` codewords.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.spec import MechanismError as MechanismError
from privtune_flwr.privacy.spec import MechanismSpec as MechanismSpec
from privtune_flwr.privacy.spec import Param as Param
from privtune_flwr.privacy.spec import ParamReader as ParamReader

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.learning import Learner
    from privtune_flwr.privacy.privtune.bank import Bottom
    from privtune_flwr.privacy.public import PublicKnowledge


@dataclass(frozen=True)
class Guarantee:
    """What a mechanism promises, in words a ledger can keep.

    Parameters
    ----------
    metric : str
        The distance d_chi that the promise is about.
    adversary : str
        What the adversary is assumed to know.
    eta : float or None
        The largest effective eta over all tokens, per unit of that distance and per released
        token; ``None`` where nothing is promised.
    statement : str
        The promise and its limits.
    """

    metric: str
    adversary: str
    eta: float | None
    statement: str


@dataclass(frozen=True)
class Strength:
    """How much one release can tell, in the currencies in which a device may set bounds.

    Attributes
    ----------
    eta : float or None
        d_chi: the largest effective eta of a token, per unit of distance.
    epsilon : float or None
        Local differential privacy of one token, or of one sentence (see ``per``).
    delta : float
        Belongs to ``epsilon``; 0 for pure privacy.
    bits : float or None
        The most that one token's released row can carry, whatever was learned: log2 of the number
        of rows that there are.
    per : {"token", "sentence"}
        What ``epsilon`` is about. A sentence's own replacement is the adjacency in both cases;
        per token it composes over the tokens.
    """

    eta: float | None = None
    epsilon: float | None = None
    delta: float = 0.0
    bits: float | None = None
    per: Literal["token", "sentence"] = "token"


def bound_words(strength: Mapping[str, Any]) -> str:
    """Put a formal bound in a few words; empty where there is none.

    Parameters
    ----------
    strength : Mapping
        The fields of :class:`Strength` by name, as results hold them.
    """
    said = []
    if strength["eta"] is not None:
        said.append(f"eta {strength['eta']:.3g}")
    delta = strength["delta"] or 0.0
    # whatever epsilon is, a delta of 1 allows everything
    if strength["epsilon"] is not None and delta < 1:
        beside = f", delta {delta:.0e}" if delta else ""
        said.append(f"epsilon {strength['epsilon']:.3g}{beside} per {strength['per']}")
    if strength["bits"] is not None:
        said.append(f"{strength['bits']:.3g} bits a token")
    return "; ".join(said)


@dataclass(frozen=True)
class Channel:
    """A mechanism that releases, for each token on its own, one of finitely many rows.

    Attributes
    ----------
    codebook_cd : float array, shape (C, d)
        The rows that may be released, all different.
    table_vc : float array, shape (V, C)
        P(row c is released | token v); each token's sum to one.

    Raises
    ------
    ValueError
        If the shapes do not fit or a token's probabilities are no distribution.
    """

    codebook_cd: NDArray[np.floating[Any]]
    table_vc: NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        if self.codebook_cd.ndim != 2 or self.table_vc.shape[1:] != self.codebook_cd.shape[:1]:
            raise ValueError(
                "a channel needs a codebook (C, d) and a table (V, C), "
                f"got {self.codebook_cd.shape} and {self.table_vc.shape}"
            )
        table = self.table_vc
        if not ((table >= 0).all() and np.allclose(table.sum(axis=1), 1.0, atol=1e-6)):
            raise ValueError("a channel's probabilities must be a distribution for each token")


class TokenChannel(Protocol):
    """A mechanism that replaces tokens by tokens, as an attacker who knows its table sees it."""

    def log_likelihood(self, outputs_N: NDArray[np.int64]) -> NDArray[np.float32]:
        """Give log P(output token | v) of each released token for every v, (N, V)."""


class Mechanism(ABC):
    """One way to perturb the representations of a sentence before they leave the device."""

    name: ClassVar[str]
    #: ``rows``: perturbs clean rows at the cut. ``tokens``: starts from the sentence's tokens and
    #: uses the bottom model itself, which must be attached.
    reads: ClassVar[Literal["rows", "tokens"]] = "rows"
    #: A released row is the clean row, plus the known shift of its token, plus noise of mean zero.
    additive: ClassVar[bool] = True
    #: Parts of it are learned from private text, in rounds of their own before the release.
    learned: ClassVar[bool] = False

    def __init__(self, spec: MechanismSpec) -> None:
        self.spec = spec
        self._bottom: Bottom | None = None

    def attach(self, bottom: Bottom) -> Self:
        """Give the device's bottom model to a mechanism that reads tokens."""
        self._bottom = bottom
        return self

    @property
    def bottom(self) -> Bottom:
        """The attached bottom model.

        Raises
        ------
        MechanismError
            If none was attached.
        """
        if self._bottom is None:
            raise MechanismError(f"{self.name}: reads tokens, so it needs the bottom model")
        return self._bottom

    def width(self, hidden_size: int) -> int:
        """Give the width of a released row; ``hidden_size`` is that of representations."""
        return hidden_size

    @classmethod
    @abstractmethod
    def design(cls, config: PrivacyConfig, public: PublicKnowledge, folder: Path) -> MechanismSpec:
        """Fix the law from public knowledge alone; runs in the cloud.

        Parameters
        ----------
        config : PrivacyConfig
            What the run asks for.
        public : PublicKnowledge
            Public text seen through the bottom model.
        folder : Path
            An existing, empty folder; receives the files of the public artefact, if there is one.

        Returns
        -------
        MechanismSpec
            With ``artefact`` set to the folder's bundle id, if files were written.
        """

    @classmethod
    @abstractmethod
    def load(cls, spec: MechanismSpec, artefact: Path | None) -> Self:
        """Build the mechanism; runs on the device, which trusts neither argument.

        Parameters
        ----------
        spec : MechanismSpec
            As received.
        artefact : Path or None
            Folder with the artefact's files, if the mechanism has one.

        Raises
        ------
        MechanismError
            Naming the parameter and what is allowed, or what is wrong with the artefact.
        """

    @abstractmethod
    def guarantee(self) -> Guarantee:
        """Say what is promised, against whom."""

    @property
    @abstractmethod
    def eta_max(self) -> float | None:
        """Largest effective eta over all tokens; ``None`` where nothing is promised."""

    @abstractmethod
    def _perturb(
        self, hidden_TD: NDArray[np.float64], ids_T: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Perturb checked float64 rows; the result is checked and rounded by :meth:`perturb`."""

    @classmethod
    def declared_eta(cls, spec: MechanismSpec) -> float | None:
        """Largest effective eta that a specification admits, told without its artefact.

        A device holds a run's terms against its policy before it is provisioned; once the artefact
        is there, :attr:`eta_max` decides.
        """
        eta = spec.params.get("eta")
        return float(eta) if isinstance(eta, int | float) else None

    @classmethod
    def declared(cls, spec: MechanismSpec) -> Strength:
        """Say how strong a specification is at most, without its artefact; None means unbounded."""
        return Strength(eta=cls.declared_eta(spec))

    @classmethod
    def learner(
        cls, spec: MechanismSpec, artefact: Path | None, bottom: Bottom, num_labels: int
    ) -> Learner:
        """Build what learns this mechanism's parts before release; only if :attr:`learned`.

        Parameters
        ----------
        spec : MechanismSpec
            As designed: it also holds every setting of the learning.
        artefact : Path or None
            Its files.
        bottom : Bottom
            The device's (or the cloud's) bottom model.
        num_labels : int
            Classes of the task.
        """
        raise MechanismError(f"{cls.name}: has nothing to learn")

    @property
    def strength(self) -> Strength:
        """How much one release can tell."""
        return Strength(eta=self.eta_max)

    def shift(self) -> NDArray[np.floating[Any]] | None:
        """Known mean of the noise for each token, (V, d), or ``None`` where it is zero.

        Public by Kerckhoffs: the cloud's decoder and the defence-aware attacker both use it.
        """
        return None

    def channel(self) -> Channel | None:
        """Give the law of a mechanism that releases one of finitely many rows for each token.

        For mechanisms whose row depends on the token (and chance) alone, independently of the
        other tokens; public by Kerckhoffs. ``None`` for all others.
        """
        return None

    def token_channel(self) -> TokenChannel | None:
        """Give the law of a mechanism that replaces each token by another, on its own.

        What is released is the bottom model's representation of the replaced sentence.
        ``None`` for all others.
        """
        return None

    def perturb(
        self, hidden_TD: NDArray[Any], token_ids_T: NDArray[Any], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Perturb one sentence.

        Parameters
        ----------
        hidden_TD : float array, shape (T, d)
            Clean representations at the cut of one sentence *without padding*: its attention mask
            is all ones by construction, hence no mask is taken.
        token_ids_T : int array, shape (T,)
            Its token ids.
        rng : numpy.random.Generator
            From :func:`privtune_flwr.privacy.keyed.keyed_generator` for anything that is
            released.

        Returns
        -------
        float32 array, shape (T, width(d))
            What may be released.

        Raises
        ------
        MechanismError
            If shapes do not fit or a number is not finite, before or after: no such value passes.
        """
        hidden = np.asarray(hidden_TD)
        ids = np.asarray(token_ids_T)
        if hidden.ndim != 2 or ids.shape != hidden.shape[:1]:
            raise MechanismError(
                f"{self.name}: needs hidden (T, d) and token ids (T,), "
                f"got {hidden.shape} and {ids.shape}"
            )
        if not np.issubdtype(hidden.dtype, np.floating) or not np.issubdtype(ids.dtype, np.integer):
            raise MechanismError(
                f"{self.name}: needs floating hidden and integer token ids, "
                f"got {hidden.dtype} and {ids.dtype}"
            )
        hidden_64 = hidden.astype(np.float64)
        if not np.isfinite(hidden_64).all():
            raise MechanismError(f"{self.name}: a representation is not finite; nothing released")
        with np.errstate(over="ignore"):  # an overflow becomes inf and is refused below
            released = self._perturb(hidden_64, ids.astype(np.int64), rng).astype(np.float32)
        expected = len(hidden), self.width(hidden.shape[1])
        if released.shape != expected or not np.isfinite(released).all():
            raise MechanismError(f"{self.name}: the perturbed values are not finite; none released")
        return released
