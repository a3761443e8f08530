"""What a privacy mechanism is: designed in the cloud, loaded and applied on the device.

Shapes: ``T`` tokens of one sentence, ``d`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.errors import PrivTuneError

if TYPE_CHECKING:
    from privtune_flwr.config import PrivacyConfig
    from privtune_flwr.privacy.public import PublicKnowledge

Param = str | int | float


class MechanismError(PrivTuneError, ValueError):
    """A mechanism that cannot be designed, loaded or applied; nothing may be released.

    Its message is built from specifications, shapes and types, never from text or values.
    """


@dataclass(frozen=True)
class MechanismSpec:
    """A mechanism and all that determines its law, small enough to travel with each message.

    Parameters
    ----------
    name : str
        Name in the registry.
    params : dict
        Strings, integers and finite floats.
    artefact : str
        Bundle id of the public artefact's files, empty if there is none.

    Raises
    ------
    MechanismError
        If a parameter has another type or is not finite.
    """

    name: str
    params: Mapping[str, Param] = field(default_factory=dict)
    artefact: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise MechanismError(f"mechanism name: a non-empty string is needed, got {self.name!r}")
        if not isinstance(self.artefact, str):
            raise MechanismError(f"{self.name}: artefact must be a string, got {self.artefact!r}")
        if not isinstance(self.params, Mapping):
            raise MechanismError(f"{self.name}: params must be a mapping, got {self.params!r}")
        for key, value in self.params.items():
            if not isinstance(key, str):
                raise MechanismError(f"{self.name}: parameter name {key!r} is not a string")
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise MechanismError(f"{self.name}.{key} = {value!r}: must be a string or a number")
            if isinstance(value, float) and not math.isfinite(value):
                raise MechanismError(f"{self.name}.{key} = {value!r}: must be finite")
        # A copy, so that nobody changes a specification whose id already keys noise.
        object.__setattr__(self, "params", dict(self.params))

    def __hash__(self) -> int:
        return hash(self.to_json())

    def to_json(self) -> str:
        """Write canonical JSON: sorted keys, no spaces, ASCII; equal specifications, equal text."""
        content = {"artefact": self.artefact, "name": self.name, "params": dict(self.params)}
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises
        ------
        MechanismError
            On anything else: other keys, doubled keys, non-finite numbers, broken JSON.
        """
        try:
            content = json.loads(
                text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant
            )
        except (ValueError, RecursionError) as error:
            raise MechanismError(f"mechanism specification: {error}") from None
        if not isinstance(content, dict) or set(content) != {"name", "params", "artefact"}:
            raise MechanismError(
                "mechanism specification: needs exactly the keys artefact, name, params"
            )
        return cls(content["name"], content["params"], content["artefact"])

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, in hex: what noise is keyed by and releases are marked."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


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


class Mechanism(ABC):
    """One way to perturb the representations of a sentence before they leave the device."""

    name: ClassVar[str]

    def __init__(self, spec: MechanismSpec) -> None:
        self.spec = spec

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
        float32 array, shape (T, d)
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
        if released.shape != hidden.shape or not np.isfinite(released).all():
            raise MechanismError(f"{self.name}: the perturbed values are not finite; none released")
        return released


class ParamReader:
    """Read a specification's parameters strictly: each is named, typed, bounded, none left over."""

    def __init__(self, spec: MechanismSpec, names: Iterable[str]) -> None:
        self._spec = spec
        expected = set(names)
        for name in sorted(expected - set(spec.params)):
            raise MechanismError(f"{spec.name}.{name}: missing")
        for name in sorted(set(spec.params) - expected):
            allowed = ", ".join(sorted(expected)) or "none"
            raise MechanismError(f"{spec.name}.{name}: unknown parameter; allowed: {allowed}")

    def real(self, name: str, low: float, high: float) -> float:
        """Give a float in [low, high]."""
        value = self._spec.params[name]
        if isinstance(value, str) or not low <= value <= high:
            raise MechanismError(
                f"{self._spec.name}.{name} = {value!r}: must be a number from {low:g} to {high:g}"
            )
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int:
        """Give an int in [low, high]."""
        value = self._spec.params[name]
        if not isinstance(value, int) or not low <= value <= high:
            raise MechanismError(
                f"{self._spec.name}.{name} = {value!r}: must be an integer from {low} to {high}"
            )
        return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is given twice")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
