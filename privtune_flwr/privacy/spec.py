"""What fixes a mechanism's law: a specification that travels with each message."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from privtune_flwr.errors import PrivTuneError

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
