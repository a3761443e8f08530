"""The owner's bounds, and the account of what left."""

from __future__ import annotations

import math
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from privtune_flwr.config import ConfigError
from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.ledger import Ledger
from privtune_flwr.privacy.mods import REFUSED
from privtune_flwr.privacy.policy import DevicePolicy, load_policy


def policy(**values: Any) -> DevicePolicy:
    return load_policy(
        {f"policy-{k.replace('_', '-')}": v for k, v in values.items()}, simulated=False
    )


# ------------------------------------------------------------------------------------------ policy


def test_a_real_device_is_strict_and_a_simulated_one_is_not() -> None:
    real, simulated = load_policy({}, simulated=False), load_policy({}, simulated=True)
    assert "none" not in real.mechanisms
    assert "privtune" in real.mechanisms
    assert (real.share_labels, real.releases_per_example) == (False, 1)
    assert "none" in simulated.mechanisms
    assert (simulated.share_labels, simulated.releases_per_example) == (True, 0)


@pytest.mark.parametrize(
    ("bounds", "ask", "named"),
    [
        ({}, lambda p: p.check_mechanism("none", None), "policy.mechanisms: 'none'.*dchi"),
        ({}, lambda p: p.check_mechanism("magic", 1.0), "policy.mechanisms: 'magic'"),
        ({"mechanisms": "dchi"}, lambda p: p.check_mechanism("privtune", 1.0), "policy.mechanisms"),
        ({"max_eta": 10}, lambda p: p.check_mechanism("dchi", 10.1), "policy.max-eta.*10.1.*10"),
        ({"max_eta": 10}, lambda p: p.check_mechanism("dchi", None), "policy.max-eta.*inf"),
        ({"max_eta": 10}, lambda p: p.check_mechanism("dchi", math.nan), "policy.max-eta.*nan"),
        ({}, lambda p: p.check_labels(True), "policy.share-labels"),
        ({}, lambda p: p.check_releases(2), "policy.releases-per-example.*2.*1"),
        ({"releases_per_example": 3}, lambda p: p.check_releases(4), "releases-per-example.*4.*3"),
        ({"bottom_models": "a" * 64}, lambda p: p.check_bottom("b" * 64), "policy.bottom-models"),
    ],
)
def test_each_bound_refuses_and_names_itself(bounds: dict[str, Any], ask: Any, named: str) -> None:
    with pytest.raises(Refusal, match=named):
        ask(policy(**bounds))


def test_what_is_within_the_bounds_passes() -> None:
    bounds = policy(
        mechanisms="dchi,none",
        max_eta=10,
        share_labels=True,
        bottom_models=f"{'a' * 64},{'b' * 64}",
    )
    bounds.check_mechanism("dchi", 10.0)
    bounds.check_labels(True)
    bounds.check_releases(1)
    bounds.check_bottom("b" * 64)
    policy().check_labels(False)
    policy(releases_per_example=0).check_releases(10**6)
    policy(mechanisms="*").check_mechanism("none", None)


def test_node_config_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('max-eta = 5.0\nshare-labels = true\nmechanisms = ["dchi"]\n')
    loaded = load_policy({"policy": str(path), "policy-max-eta": 2.0}, simulated=False)
    assert (loaded.max_eta, loaded.share_labels, loaded.mechanisms) == (2.0, True, ("dchi",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"max-epsilon = 3.0\n", "max-epsilon = 3.0: unknown key.*max-eta"),
        (b"max-eta = -1.0\n", "max-eta = -1.0.*above 0"),
        (b"max-eta = nan\n", "max-eta = nan"),
        (b'mechanisms = ["magic"]\n', "policy.mechanisms = 'magic'.*dchi"),
        (b"max-eta = \n", "policy = .*TOMLDecodeError"),
        (b"\xff\xfe", "policy = .*UnicodeDecodeError"),
    ],
)
def test_a_policy_file_with_a_mistake_is_not_used(
    tmp_path: Path, content: bytes, named: str
) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        load_policy({"policy": str(path)}, simulated=False)


def test_a_policy_that_cannot_be_read_releases_nothing(make_device: Any, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("max-eta = [")
    for broken in (path, tmp_path / "missing.toml"):
        device = make_device(policy=str(broken))
        reply = device.ask(device.request())
        assert reply.has_error()
        assert reply.error.code == REFUSED
        assert "policy" in reply.error.reason
        assert not (device.root / "ledger.sqlite").exists()


# ------------------------------------------------------------------------------------------ ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def reserve(
    ledger: Ledger, *names: str, release: str = "m/0", eta: float | None = 2.0, bound: int = 1
) -> int:
    keys = [name.encode().ljust(16) for name in names]
    return ledger.reserve(
        keys,
        [7] * len(keys),
        release=release,
        mechanism="dchi",
        eta=eta,
        policy=policy(releases_per_example=bound),
    )


def test_a_retry_spends_nothing(ledger: Ledger) -> None:
    assert reserve(ledger, "a", "b") == 2
    assert reserve(ledger, "a", "b") == 0
    assert reserve(ledger, "b", "c") == 1
    assert ledger.spent().releases == 3


def test_another_release_counts_and_etas_add_up(ledger: Ledger) -> None:
    reserve(ledger, "a", "b", bound=0)
    assert reserve(ledger, "a", release="m/1", eta=0.5, bound=0) == 1
    spent = ledger.spent()
    assert (spent.examples, spent.releases, spent.max_releases_per_example) == (2, 3, 2)
    assert spent.eta_sum_max == 2.5


def test_a_release_without_a_guarantee_makes_the_total_unbounded(ledger: Ledger) -> None:
    reserve(ledger, "a")
    reserve(ledger, "b", eta=None)
    assert ledger.spent().eta_sum_max is None


def test_over_the_bound_nothing_is_entered(ledger: Ledger) -> None:
    reserve(ledger, "b")
    with pytest.raises(Refusal, match="releases-per-example"):
        reserve(ledger, "a", "b", "c", release="m/1")
    assert ledger.spent().releases == 1
    # "a" was not entered on the way to the refusal, so it may still leave
    assert reserve(ledger, "a", "c", release="m/1") == 2


def test_a_new_ledger_is_empty(ledger: Ledger) -> None:
    spent = ledger.spent()
    assert (spent.examples, spent.releases, spent.max_releases_per_example) == (0, 0, 0)
    assert spent.eta_sum_max == 0.0


def test_the_account_outlives_the_process_and_two_messages_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path)
    refused: list[str] = []

    def one(number: int) -> None:
        try:
            reserve(Ledger(path), "a", release=f"m/{number}", bound=3)
        except Refusal as refusal:
            refused.append(str(refusal))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))
    assert len(refused) == 9
    assert Ledger(path).spent().max_releases_per_example == 3


def test_the_file_is_the_owners_and_says_nothing_about_the_text(make_device: Any) -> None:
    device = make_device()
    assert device.ask(device.request()).has_content()
    path = device.root / "ledger.sqlite"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    stored = b"".join(p.read_bytes() for p in device.root.glob("ledger.sqlite*"))
    for text in device.holdings.chunk("train", 0, 4).texts:
        assert device.home.example_key(text) in stored
        words = text.split()
        for start in range(len(words) - 3):
            assert " ".join(words[start : start + 4]).encode() not in stored
