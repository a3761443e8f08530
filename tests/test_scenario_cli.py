"""Scenarios, the command line, and the app that Flower is given."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from typer.testing import CliRunner

import privtune_flwr
import simulations
import strategies
from privtune_flwr.assets import list_assets
from privtune_flwr.cli import _parse_overrides, main
from privtune_flwr.config import ConfigError, RunConfig, flatten
from privtune_flwr.launcher import stage_app
from privtune_flwr.scenario import load_scenario, packaged_scenarios


def privtune(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


# --------------------------------------------------------------------------------------- scenarios


def test_packaged_scenarios_load_and_say_what_they_are() -> None:
    found = packaged_scenarios()
    assert "demo" in found
    for name, description in found.items():
        scenario = load_scenario(name)
        assert scenario.name == name
        assert scenario.federation.num_supernodes >= 1
        assert scenario.run_config()
        assert len(description) > 10


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_scenario_file_sets_the_federation_and_the_run(tmp_path: Path) -> None:
    text = "[federation]\nnum-supernodes = 3\n[config.model]\ncut = 1\n[config.train]\nepochs = 7\n"
    scenario = load_scenario(write(tmp_path, text))
    assert (scenario.name, scenario.federation.num_supernodes) == ("mine", 3)
    config = scenario.run_config({"train.epochs": 2, "run.name": "x"})
    assert (config.model.cut, config.train.epochs, config.run.name) == (1, 2, "x")
    assert config.train.batch_size == RunConfig().train.batch_size


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[config.model]\ncuts = 1\n", ["model.cuts = 1", "unknown key", "max-length"]),
        ("[config.model]\ncut = 999\n", ["model.cut = 999", "at most 200"]),
        ("[config.modell]\ncut = 1\n", ["modell", "unknown key"]),
        ("[config]\ncut = 1\n", ["cut", "unknown key"]),
        ("[federation]\nnodes = 1\n", ["federation.nodes = 1", "num-supernodes"]),
        ("[federation]\nnum-supernodes = 0\n", ["federation.num-supernodes = 0", "at least 1"]),
        ("[extra]\na = 1\n", ["extra", "unknown key"]),
        ("[federation\n", ["scenario = ", "mine.toml"]),
    ],
)
def test_a_wrong_scenario_names_the_key(text: str, named: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_scenario(write(tmp_path, text))
    for part in named:
        assert part in str(caught.value)


def test_a_scenario_states_what_differs_from_the_one_it_extends(tmp_path: Path) -> None:
    base = 'name = "base"\n'
    base += "[config.model]\ncut = 1\n[config.train]\nepochs = 7\n[compare]\nseeds = [0, 1]\n"
    (tmp_path / "base.toml").write_text(base)
    own = 'extends = "base.toml"\n[config.train]\nepochs = 2\n[compare]\nseeds = [5]\n'
    scenario = load_scenario(write(tmp_path, own))
    config = scenario.run_config()
    assert (config.model.cut, config.train.epochs, scenario.compare.seeds) == (1, 2, (5,))
    assert scenario.name == "mine"
    packaged = load_scenario(write(tmp_path, 'extends = "slow"\n[federation]\nnum-supernodes = 3'))
    assert packaged.run_config().simulation.slow_devices == pytest.approx(0.3)
    assert packaged.federation.num_supernodes == 3


@pytest.mark.parametrize(
    ("extends", "reason"),
    [('"mine.toml"', "extends itself"), ('"none.toml"', "no such file"), ("3", "must be a")],
)
def test_a_scenario_that_extends_nothing_sound_is_refused(
    extends: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_scenario(write(tmp_path, f"extends = {extends}\n"))


def test_an_unknown_scenario_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"scenario = 'nosuch': no such file; packaged: .*demo"):
        load_scenario("nosuch")


# ------------------------------------------------------------------------------------ command line


def test_help_lists_the_commands() -> None:
    code, output = privtune("--help")
    assert code == 0
    for command in ("run", "results", "scenarios", "assets"):
        assert command in output


def test_no_command_and_an_unknown_one_are_usage_errors() -> None:
    assert privtune()[0] == 2
    assert privtune("nosuch")[0] == 2


def test_listings_name_everything() -> None:
    code, output = privtune("assets", "list")
    assert code == 0
    for info in list_assets():
        assert info.name in output
    code, output = privtune("scenarios")
    assert code == 0
    assert "demo" in output


def test_a_missing_scenario_ends_with_one_line(tmp_path: Path) -> None:
    code, output = privtune("run", "nosuch", "--folder", str(tmp_path))
    assert code == 1
    assert output.startswith("privtune: scenario = 'nosuch'")
    assert len(output.splitlines()) == 1


def test_a_wrong_override_ends_before_anything_starts(tmp_path: Path) -> None:
    code, output = privtune("run", "demo", "--folder", str(tmp_path), "--set", "model.cut=-1")
    assert code == 1
    assert "model.cut = -1" in output
    code, output = privtune("run", "demo", "--folder", str(tmp_path), "--set", "model.cut")
    assert code == 1
    assert "must be section.key=value" in output
    assert list(tmp_path.iterdir()) == []


def test_overrides_are_typed_as_in_toml() -> None:
    entries = ["model.cut=1", "privacy.noise=0.5", "run.resume=true", "model.name=minilm"]
    assert _parse_overrides([*entries, 'a.b="c"']) == {
        "model.cut": 1,
        "privacy.noise": 0.5,
        "run.resume": True,
        "model.name": "minilm",
        "a.b": "c",
    }


RESULTS = {
    "config": {"model.name": "minilm", "model.cut": 2},
    "privacy": {"mechanism": "dchi", "decoder": False, "eta_max": 12.5},
    "final": {"test_accuracy": 0.8125},
    "devices": {"used": 9, "quarantined": {"device-00003": "NaN"}, "refused": {}},
}


def test_results_side_by_side(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(RESULTS | {"name": name}))
    code, output = privtune("results", str(tmp_path / "one"), str(tmp_path / "two/results.json"))
    assert code == 0
    for shown in ("one", "two", "0.8125", "12.5", "dchi", "minilm, 2"):
        assert shown in output


def test_results_of_a_folder_without_any(tmp_path: Path) -> None:
    code, output = privtune("results", str(tmp_path))
    assert code == 1
    assert output == f"privtune: {tmp_path}: has no results.json (yet)\n"


# ------------------------------------------------------------------------------------- Flower's app


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage_app(tmp_path_factory.mktemp("app"))


def modules(root: Path) -> set[str]:
    return {str(path.relative_to(root.parent)) for path in root.rglob("*.py")}


def test_a_staged_app_holds_every_module_and_no_results(staged: Path) -> None:
    for package in (privtune_flwr, strategies, simulations):
        source = Path(str(package.__file__)).parent
        assert modules(staged / source.name) == modules(source)
    assert (staged / "simulations" / "scenarios" / "demo.toml").is_file()
    assert not (staged / "simulations" / "results").exists()


def test_flower_accepts_a_staged_app(staged: Path) -> None:
    config, warnings = load_and_validate(staged / "pyproject.toml")
    app = config["tool"]["flwr"]["app"]
    assert warnings == []
    assert app["components"] == {
        "serverapp": "privtune_flwr.server_app:app",
        "clientapp": "privtune_flwr.client_app:app",
    }
    written = {
        f"{s}.{key}": value for s, keys in app["config"].items() for key, value in keys.items()
    }
    assert written == flatten(RunConfig())


def test_a_staged_app_builds_small_and_whole(staged: Path) -> None:
    fab = build_fab_from_disk(staged)
    assert len(fab) < 10 * 2**20
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
    for name in ("privtune_flwr", "strategies", "simulations"):
        assert modules(staged / name) <= packed


def test_another_client_app_can_be_staged(tmp_path: Path) -> None:
    target = stage_app(tmp_path, client_app="rogue:app")
    config, _ = load_and_validate(target / "pyproject.toml", check_module=False)
    assert config["tool"]["flwr"]["app"]["components"]["clientapp"] == "rogue:app"
