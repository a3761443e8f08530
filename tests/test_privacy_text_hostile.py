"""Hostile artefacts and parameters of mechanisms that replace tokens are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from privacy_toy import SEP, VOCABULARY
from safetensors.numpy import load_file, save_file
from text_kit import NAMES, TEXT, TableBottom, design, make_toy

from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.public import PublicKnowledge
from privtune_flwr.privacy.registry import create_mechanism
from privtune_flwr.privacy.text.base import TENSORS


@pytest.fixture
def toy(tmp_path: Path) -> PublicKnowledge:
    return make_toy(tmp_path)


# ---- hostile artefacts --------------------------------------------------------------------------


def _all_special(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["special"] = np.arange(VOCABULARY - 2)
    params["special"] = VOCABULARY - 2


def _falling(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["special"] = tensors["special"][::-1].copy()


def _nan(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["vectors"][7, 0] = np.nan


def _spread(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["vectors"] = tensors["vectors"] * np.float16(100)
    if "delta" in params:
        params["delta"] = 1.0


def _no_sensitive(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["sensitive"][:] = 0
    tensors["sensitive"][40] = 1


def _special_sensitive(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["sensitive"][np.flatnonzero(tensors["sensitive"])[0]] = 0
    tensors["sensitive"][SEP] = 1


def _lonely(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["set"][20] = tensors["set"].max() + 1


def _outside(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["set"][20] = -1


def _steep(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["utility"][20, 3] = 8


def _all_kept(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["kept"][TEXT] = 1


def _missing(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    del tensors["special"]


def _wide_type(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    tensors["special"] = tensors["special"].astype(np.float32)


def _huge(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    params["vocabulary"] = 10**9


def _strange(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    params["vocabulary"] = "60"


HOSTILE = [
    *((name, change) for name in NAMES for change in (_all_special, _falling, _missing)),
    *((name, change) for name in NAMES for change in (_wide_type, _huge, _strange)),
    *((name, change) for name in NAMES if name != "custext+" for change in (_nan, _spread)),
    ("santext+", _no_sensitive),
    ("santext+", _special_sensitive),
    *(("custext+", change) for change in (_lonely, _outside, _steep, _all_kept)),
]


@pytest.mark.parametrize(("name", "change"), HOSTILE)
def test_hostile_artefacts_are_refused(
    toy: PublicKnowledge, tmp_path: Path, name: str, change: Callable[..., None]
) -> None:
    spec, folder = design(name, toy, tmp_path / "a", epsilon=1.5, candidates=10, eta=3.0)
    assert create_mechanism(spec, folder, TableBottom())
    tensors, params = load_file(folder / TENSORS), dict(spec.params)
    change(tensors, params)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(MechanismError):
        create_mechanism(MechanismSpec(spec.name, params, spec.artefact), folder, TableBottom())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("santext+", {"eta": 0.0}),
        ("santext+", {"replace": 0.0}),
        ("santext+", {"sensitive": 1.5}),
        ("custext+", {"epsilon": 1e9}),
        ("custext+", {"candidates": 1}),
        ("custext+", {"width": 10**6}),
        ("rantext", {"epsilon": 0.0}),
        ("rapt", {"eta": "3"}),
        ("rapt", {"more": 1}),
    ],
)
def test_wrong_parameters_are_refused(
    toy: PublicKnowledge, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    spec, folder = design(name, toy, tmp_path / "a")
    with pytest.raises(MechanismError, match=next(iter(change))):
        create_mechanism(MechanismSpec(name, {**spec.params, **change}, spec.artefact), folder)
    with pytest.raises(MechanismError, match="artefact"):
        create_mechanism(spec, None)
