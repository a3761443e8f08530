"""The run configuration: one source of truth, and errors a user can act on."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from privtune_flwr.config import ConfigError, RunConfig, flat_keys, flatten, load_run_config

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_pyproject_holds_every_key_with_its_default() -> None:
    sections = tomllib.loads(PYPROJECT.read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    written = flat_keys(sections)
    defaults = flatten(RunConfig())
    assert written == defaults
    # TOML types too: Flower refuses an override of another type
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in defaults.items()}


def test_flatten_and_load_are_inverse() -> None:
    flat = flatten(RunConfig()) | {
        "model.cut": 4,
        "data.partitioner": "dirichlet",
        "privacy.mechanism": "dchi",
        "train.fraction": 0.5,
        "run.name": "a.run_1-b",
        "run.resume": True,
    }
    config = load_run_config(flat)
    assert flatten(config) == flat
    assert config.model.cut == 4
    assert config.run.resume is True


def test_missing_keys_take_their_default() -> None:
    assert load_run_config({}) == RunConfig()
    assert load_run_config({"model.max-length": 64}).model.max_length == 64


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("nosuch.key", 1, ["nosuch", "unknown key", "recovery, federated, simulation, run"]),
        ("seed", 1, ["seed = 1", "unknown key", "run.*"]),
        ("train.epoch", 3, ["train.epoch = 3", "unknown key", "epochs"]),
        ("privacy.wire", "int4", ["privacy.wire = 'int4'", '"int8"', '"float16"']),
        ("train.schedule", "step", ["train.schedule = 'step'", '"cosine"']),
        ("privacy.labels", "device", ["privacy.labels = 'device'", '"shared"']),
        ("model.cut", -1, ["model.cut = -1", "at least 0", "at most 200"]),
        ("train.fraction", 0.0, ["train.fraction = 0.0", "above 0", "at most 1"]),
        ("train.warmup", 1.0, ["train.warmup = 1.0", "below 1"]),
        ("privacy.noise", float("nan"), ["privacy.noise = nan", "above 0"]),
        ("model.cut", "two", ["model.cut = 'two'", "int"]),
        ("model.cut", 2.5, ["model.cut = 2.5", "int"]),
        ("model.name", 3, ["model.name = 3", "str"]),
        ("model.name", "", ["model.name = ''"]),
        ("run.name", "../up", ["run.name = '../up'", "like"]),
        ("privacy.mechanism", "magic", ["privacy.mechanism = 'magic'", "dchi", "none", "privtune"]),
        ("data.public-text", "tweets,nosuch", ["public-text", "'nosuch'", "amazon-snippets"]),
        ("privacy.learning.rounds", 0, ["privacy.learning", "rounds = 0", "warm-start = 'labels'"]),
        ("data.partitioner", "column", ["partition-column", "partitioner = column"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(
    key: str, value: object, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config({key: value})
    for part in named:
        assert part in str(caught.value)


def test_every_wrong_key_has_its_own_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config({"model.cut": -1, "train.epochs": 0, "run.nosuch": 1})
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["model.cut", "train.epochs", "run.nosuch"]


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().model.cut = 3
