"""The mechanisms by name. Importing this module registers the built-in ones and stays light."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from privtune_flwr.privacy.base import Mechanism, MechanismError, MechanismSpec
from privtune_flwr.privacy.bottleneck.mechanism import Bottleneck
from privtune_flwr.privacy.cells.mechanism import Cells, LabelCells
from privtune_flwr.privacy.dchi import DChi
from privtune_flwr.privacy.dp_forward import DPForward
from privtune_flwr.privacy.gaussian import Gaussian
from privtune_flwr.privacy.identity import Identity
from privtune_flwr.privacy.privtune.bank import Bottom
from privtune_flwr.privacy.privtune.mechanism import PrivTune
from privtune_flwr.privacy.sap import SAP
from privtune_flwr.privacy.text.custext import CusText
from privtune_flwr.privacy.text.rantext import RanText
from privtune_flwr.privacy.text.rapt import RAPT
from privtune_flwr.privacy.text.santext import SanText
from privtune_flwr.privacy.textobfuscator import TextObfuscator

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


def create_mechanism(
    spec: MechanismSpec, artefact: Path | None = None, bottom: Bottom | None = None
) -> Mechanism:
    """Build the mechanism that a specification names; see :meth:`Mechanism.load`.

    ``bottom`` is needed before anything can be perturbed by a mechanism that reads tokens.
    """
    mechanism = mechanism_class(spec.name).load(spec, artefact)
    return mechanism if bottom is None else mechanism.attach(bottom)


for _builtin in (
    Identity,
    DChi,
    PrivTune,
    Gaussian,
    SAP,
    DPForward,
    TextObfuscator,
    SanText,
    CusText,
    RanText,
    RAPT,
    Bottleneck,
    Cells,
    LabelCells,
):
    register_mechanism(_builtin)
