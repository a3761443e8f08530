"""The mechanisms by name. Importing this module registers the built-in ones and stays light."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from privtune_flwr.privacy.base import Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.dchi import DChi
from privtune_flwr.privacy.identity import Identity
from privtune_flwr.privacy.privtune.mechanism import PrivTune

M = TypeVar("M", bound=type[Mechanism])

_MECHANISMS: dict[str, type[Mechanism]] = {}


def register_mechanism(mechanism: M) -> M:
    """Add a mechanism class under its ``name``; usable as a decorator.

    Raises
    ------
    MechanismError
        If the name is taken: a second mechanism must not slip in under a name a policy allows.
    """
    if mechanism.name in _MECHANISMS:
        raise MechanismError(f"mechanism {mechanism.name!r} is already registered")
    _MECHANISMS[mechanism.name] = mechanism
    return mechanism


def mechanism_names() -> tuple[str, ...]:
    """List the registered names, sorted."""
    return tuple(sorted(_MECHANISMS))


def mechanism_class(name: str) -> type[Mechanism]:
    """Look a mechanism up, for :meth:`Mechanism.design`.

    Raises
    ------
    MechanismError
        If the name is unknown.
    """
    if name not in _MECHANISMS:
        raise MechanismError(f"mechanism {name!r}: allowed: {', '.join(mechanism_names())}")
    return _MECHANISMS[name]


def create_mechanism(spec: MechanismSpec, artefact: Path | None = None) -> Mechanism:
    """Build the mechanism that a specification names; see :meth:`Mechanism.load`."""
    return mechanism_class(spec.name).load(spec, artefact)


for _builtin in (Identity, DChi, PrivTune):
    register_mechanism(_builtin)
