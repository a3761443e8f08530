"""Specifications, the registry, and refusals of everything malformed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from privtune_flwr.config import PrivacyConfig
from privtune_flwr.privacy.base import MechanismError, MechanismSpec
from privtune_flwr.privacy.dchi import DChi
from privtune_flwr.privacy.identity import Identity
from privtune_flwr.privacy.registry import (
    create_mechanism,
    mechanism_class,
    mechanism_names,
    register_mechanism,
)

GOOD = {"eta": 2.0, "dimension": 4, "unit": 1.0}


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_json_is_canonical_and_round_trips() -> None:
    spec = MechanismSpec("m", {"b": 1, "a": 0.1, "c": "é"}, "ff")
    assert spec.to_json() == ('{"artefact":"ff","name":"m","params":{"a":0.1,"b":1,"c":"\\u00e9"}}')
    again = MechanismSpec.from_json(spec.to_json())
    assert again == spec
    assert again.id == spec.id
    assert len(spec.id) == 64
    assert hash(again) == hash(spec)


def test_id_depends_on_every_part() -> None:
    specs = [
        MechanismSpec("m", {"a": 1}),
        MechanismSpec("n", {"a": 1}),
        MechanismSpec("m", {"a": 2}),
        MechanismSpec("m", {"b": 1}),
        MechanismSpec("m", {"a": 1}, "ff"),
    ]
    assert len({s.id for s in specs}) == len(specs)


def test_spec_keeps_its_own_copy() -> None:
    params = {"a": 1}
    spec = MechanismSpec("m", params)
    before = spec.id
    params["a"] = 2
    assert spec.id == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"name":"m","params":{}}',
        '{"name":"m","params":{},"artefact":"","more":1}',
        '{"name":"m","name":"n","params":{},"artefact":""}',
        '{"name":"m","params":{"a":1,"a":2},"artefact":""}',
        '{"name":"m","params":{"a":NaN},"artefact":""}',
        '{"name":"m","params":{"a":Infinity},"artefact":""}',
        '{"name":"m","params":{"a":1e999},"artefact":""}',
        '{"name":"m","params":{"a":true},"artefact":""}',
        '{"name":"m","params":{"a":null},"artefact":""}',
        '{"name":"m","params":{"a":[1]},"artefact":""}',
        '{"name":"m","params":[],"artefact":""}',
        '{"name":"","params":{},"artefact":""}',
        '{"name":"m","params":{},"artefact":null}',
    ],
)
def test_from_json_is_strict(text: str) -> None:
    with pytest.raises(MechanismError):
        MechanismSpec.from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, None, [1]])
def test_parameters_are_strings_and_finite_numbers(value: object) -> None:
    with pytest.raises(MechanismError, match=r"m\.a"):
        MechanismSpec("m", {"a": value})  # type: ignore[dict-item]


def test_registry() -> None:
    assert set(mechanism_names()) == {
        *("none", "dchi", "gaussian", "sap", "dp-forward", "textobfuscator", "privtune"),
        *("santext+", "custext+", "rantext", "rapt", "cells", "cells-labels", "bottleneck"),
    }
    assert mechanism_names() == tuple(sorted(mechanism_names()))
    assert mechanism_class("dchi") is DChi
    with pytest.raises(MechanismError, match="already registered"):
        register_mechanism(Identity)
    with pytest.raises(MechanismError, match=r"allowed: bottleneck, cells, .*, privtune"):
        create_mechanism(MechanismSpec("nonsense"))


def test_names_need_no_heavy_import() -> None:
    code = (
        "import sys, privtune_flwr.privacy.registry as r; r.mechanism_names();"
        "print([m for m in ('torch', 'sklearn', 'scipy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eta": 0.0}, "eta"),
        ({"eta": -1.0}, "eta"),
        ({"eta": 1e12}, "eta"),
        ({"eta": "2"}, "eta"),
        ({"dimension": 0}, "dimension"),
        ({"dimension": 4.0}, "dimension"),
        ({"unit": 0.0}, "unit"),
        ({"more": 1}, "more"),
    ],
)
def test_dchi_refuses_wrong_parameters(change: dict[str, float], named: str) -> None:
    with pytest.raises(MechanismError, match=rf"dchi\.{named}"):
        create_mechanism(MechanismSpec("dchi", {**GOOD, **change}))


def test_dchi_refuses_missing_parameters() -> None:
    with pytest.raises(MechanismError, match=r"dchi\.unit: missing"):
        create_mechanism(MechanismSpec("dchi", {"eta": 1.0, "dimension": 4}))


def test_none_is_the_identity_and_says_so(tmp_path: Path) -> None:
    config = PrivacyConfig(mechanism="none")
    spec = Identity.design(config, None, tmp_path)  # type: ignore[arg-type]
    mechanism = create_mechanism(spec)
    hidden = _rng().normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(mechanism.perturb(hidden, np.arange(3), _rng()), hidden)
    assert mechanism.eta_max is None
    assert mechanism.guarantee().eta is None
    assert "No protection" in mechanism.guarantee().statement
    assert mechanism.shift() is None
    with pytest.raises(MechanismError, match=r"none\.x"):
        create_mechanism(MechanismSpec("none", {"x": 1}))


@pytest.mark.parametrize("spec", [MechanismSpec("none"), MechanismSpec("dchi", GOOD)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_non_finite_value_passes(spec: MechanismSpec, bad: float) -> None:
    hidden = np.zeros((3, 4), dtype=np.float32)
    hidden[1, 2] = bad
    with pytest.raises(MechanismError, match="not finite"):
        create_mechanism(spec).perturb(hidden, np.arange(3), _rng())


def test_overflow_of_float32_is_refused() -> None:
    hidden = np.full((1, 4), 1e39)
    with pytest.raises(MechanismError, match="not finite"):
        create_mechanism(MechanismSpec("dchi", GOOD)).perturb(hidden, np.arange(1), _rng())


@pytest.mark.parametrize(
    ("hidden", "ids"),
    [
        (np.zeros((3, 4), np.float32), np.arange(2)),
        (np.zeros(4, np.float32), np.arange(4)),
        (np.zeros((3, 4), np.int64), np.arange(3)),
        (np.zeros((3, 4), np.float32), np.zeros(3)),
        (np.zeros((3, 5), np.float32), np.arange(3)),
    ],
)
def test_shapes_and_types_must_fit(hidden: np.ndarray, ids: np.ndarray) -> None:
    with pytest.raises(MechanismError):
        create_mechanism(MechanismSpec("dchi", GOOD)).perturb(hidden, ids, _rng())


def test_perturb_leaves_its_input_alone() -> None:
    hidden = np.ones((3, 4))
    released = create_mechanism(MechanismSpec("dchi", GOOD)).perturb(hidden, np.arange(3), _rng())
    assert (hidden == 1).all()
    assert released.dtype == np.float32
    assert not np.allclose(released, 1)


def test_dchi_guarantee() -> None:
    mechanism = create_mechanism(MechanismSpec("dchi", GOOD))
    assert mechanism.eta_max == mechanism.guarantee().eta == 2.0
    assert "Euclidean" in mechanism.guarantee().metric
    json.dumps(dataclasses.asdict(mechanism.guarantee()), allow_nan=False)
