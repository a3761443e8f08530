"""The owner's bounds, and the account of what left."""

from __future__ import annotations

import math
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from privtune_flwr.config import ConfigError
from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.accounting import Charge, zcdp_epsilon
from privtune_flwr.privacy.base import MechanismSpec, Strength
from privtune_flwr.privacy.identity import Identity
from privtune_flwr.privacy.ledger import Ledger
from privtune_flwr.privacy.mods import REFUSED
from privtune_flwr.privacy.policy import DevicePolicy, load_policy

LEARNS = {"learning_rounds": 3, "min_learning_noise": 0.5, "max_update_norm": 2.0}


def uses(name: str = "dchi", **strength: Any) -> Callable[[DevicePolicy], None]:
    """A run that asks for a mechanism of this strength."""
    return lambda p: p.check_mechanism(name, Strength(**strength))


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
        ({}, uses("none"), "policy.mechanisms: 'none'.*dchi"),
        ({}, uses("magic", eta=1.0), "policy.mechanisms: 'magic'"),
        ({"mechanisms": "dchi"}, uses("privtune", eta=1.0), "policy.mechanisms"),
        ({"max_eta": 10}, uses(eta=10.1), "policy.max-eta.*10.1.*10"),
        ({"max_eta": 10}, uses(), "policy.max-eta.*inf"),
        ({"max_eta": 10}, uses(eta=math.nan), "policy.max-eta.*nan"),
        ({"max_epsilon": 2}, uses(epsilon=2.1), "policy.max-epsilon.*2.1.*2"),
        ({"max_epsilon": 2}, uses(eta=1.0, bits=1.0), "policy.max-epsilon.*inf"),
        ({"max_epsilon": 2}, uses(epsilon=1.0, delta=0.01), "policy.max-epsilon.*inf"),
        ({"max_epsilon": 2}, uses(epsilon=1.0, delta=math.nan), "policy.max-epsilon.*inf"),
        ({"max_bits": 4}, uses(bits=4.1), "policy.max-bits.*4.1.*4"),
        ({"max_bits": 4, "max_eta": 9}, uses(bits=1.0, eta=9.1), "policy.max-eta.*9.1"),
        ({"max_bits": 4, "max_eta": 9}, uses(epsilon=1.0), "policy.max-eta, max-bits.*inf.*9, 4"),
        ({"budget_bits": 40}, uses(eta=1.0), "policy.budget-bits.*inf"),
        ({}, lambda p: p.check_learning(1, 1.0, 1.0), "policy.learning-rounds.*1.*0"),
        (LEARNS, lambda p: p.check_learning(4, 1.0, 1.0), "policy.learning-rounds.*4.*3"),
        (LEARNS, lambda p: p.check_learning(3, 0.0, 1.0), "policy.max-update-norm.*inf.*2"),
        (LEARNS, lambda p: p.check_learning(3, 2.1, 1.0), "policy.max-update-norm.*2.1.*2"),
        (LEARNS, lambda p: p.check_learning(3, math.nan, 1.0), "policy.max-update-norm"),
        (LEARNS, lambda p: p.check_learning(3, 1.0, 0.4), "policy.min-learning-noise.*0.4.*0.5"),
        (LEARNS, lambda p: p.check_learning(3, 1.0, math.nan), "policy.min-learning-noise.*nan"),
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
    bounds.check_mechanism("dchi", Strength(eta=10.0))
    bounds.check_labels(True)
    bounds.check_releases(1)
    bounds.check_bottom("b" * 64)
    policy().check_labels(False)
    policy(releases_per_example=0).check_releases(10**6)
    policy(mechanisms="*").check_mechanism("none", Strength())
    # one of the bounded currencies is enough, and only those that are declared count
    both = policy(max_eta=10, max_bits=4, max_epsilon=1)
    both.check_mechanism("dchi", Strength(bits=4.0))
    both.check_mechanism("dchi", Strength(eta=10.0, epsilon=1.0, delta=1e-5))
    policy(**LEARNS).check_learning(3, 2.0, 0.5)
    policy(learning_rounds=1).check_learning(1, 0.0, 0.0)
    load_policy({}, simulated=True).check_learning(10**6, 0.0, 0.0)


def test_node_config_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('max-eta = 5.0\nshare-labels = true\nmechanisms = ["dchi"]\n')
    loaded = load_policy({"policy": str(path), "policy-max-eta": 2.0}, simulated=False)
    assert (loaded.max_eta, loaded.share_labels, loaded.mechanisms) == (2.0, True, ("dchi",))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"max-mu = 3.0\n", "max-mu = 3.0: unknown key.*max-eta"),
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


class Priced(Identity):
    """Releases clean rows at a price that a test sets."""

    def __init__(self, strength: Strength) -> None:
        super().__init__(MechanismSpec("none", {"price": repr(strength)}))
        self._strength = strength

    @property
    def strength(self) -> Strength:
        return self._strength


def reserve(
    ledger: Ledger,
    *names: str,
    release: str = "m/0",
    eta: float | None = 2.0,
    bound: int = 1,
    budgets: dict[str, float] | None = None,
    **strength: Any,
) -> int:
    keys = [name.encode().ljust(16) for name in names]
    return ledger.reserve(
        keys,
        [7] * len(keys),
        release=release,
        mechanism=Priced(Strength(eta=eta, **strength)),
        policy=policy(releases_per_example=bound, **budgets or {}),
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
    assert spent.largest == Charge()
    assert (spent.updates, spent.update_rho) == (0, 0.0)


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


def test_charges_add_up_over_tokens_and_releases(ledger: Ledger) -> None:
    reserve(ledger, "a", "b", epsilon=0.5, delta=1e-6, bits=4.0, bound=0)
    reserve(ledger, "a", release="m/1", epsilon=3.0, delta=1e-5, bits=1.0, per="sentence", bound=0)
    largest = ledger.spent().largest
    # seven tokens; the second epsilon is a whole sentence's
    assert largest.eta == pytest.approx(2 * 2.0 * 7)
    assert largest.epsilon == pytest.approx(0.5 * 7 + 3.0)
    assert largest.delta == pytest.approx(7e-6 + 1e-5)
    assert largest.bits == pytest.approx(4.0 * 7 + 1.0 * 7)
    reserve(ledger, "c", bits=2.0)
    assert ledger.spent().largest.epsilon is None
    assert ledger.spent().largest.bits == pytest.approx(35.0)


@pytest.mark.parametrize(
    ("budgets", "strength", "named"),
    [
        ({"budget_eta": 28.0}, {}, r"policy.budget-eta: the run needs 42.*allowed: 28"),
        ({"budget_bits": 56.0}, {"bits": 4.0}, "policy.budget-bits: the run needs 84.*56"),
        ({"budget_epsilon": 14.0}, {"epsilon": 1.0}, "policy.budget-epsilon: the run needs 21"),
        (
            {"budget_epsilon": 2.0},
            {"epsilon": 1.0, "per": "sentence"},
            "policy.budget-epsilon: the run needs 3",
        ),
    ],
)
def test_a_budget_stops_releases_before_it_is_passed(
    budgets: dict[str, float], strength: dict[str, Any], named: str, ledger: Ledger
) -> None:
    for epoch in range(2):
        reserve(ledger, "a", release=f"m/{epoch}", bound=0, budgets=budgets, **strength)
    with pytest.raises(Refusal, match=named):
        reserve(ledger, "b", "a", release="m/2", bound=0, budgets=budgets, **strength)
    assert ledger.spent().releases == 2
    # what was released before may be asked for again, and another example has its own budget
    assert reserve(ledger, "a", release="m/1", bound=0, budgets=budgets, **strength) == 0
    assert reserve(ledger, "b", release="m/2", bound=0, budgets=budgets, **strength) == 1


def test_what_nothing_bounds_exhausts_every_budget(ledger: Ledger) -> None:
    reserve(ledger, "a", eta=None)
    with pytest.raises(Refusal, match=r"policy\.budget-eta: the run needs inf"):
        reserve(ledger, "a", release="m/1", bound=0, budgets={"budget_eta": 1e9})
    # bounded by another budget of this owner: each currency then counts what declares it
    both = {"budget_eta": 15.0, "budget_bits": 30.0}
    reserve(ledger, "b", eta=None, bits=4.0, bound=0, budgets=both)
    assert reserve(ledger, "b", release="m/1", bound=0, budgets=both) == 1
    with pytest.raises(Refusal, match=r"policy\.budget-bits: the run needs 56"):
        reserve(ledger, "b", release="m/2", eta=None, bits=4.0, bound=0, budgets=both)


def test_every_row_says_what_was_promised_in_which_metric_against_whom(ledger: Ledger) -> None:
    reserve(ledger, "a", epsilon=0.5, per="sentence")
    with closing(sqlite3.connect(ledger.path)) as db:
        db.row_factory = sqlite3.Row
        (row,) = db.execute("select * from account").fetchall()
    assert (row["eta"], row["epsilon"], row["per"], row["tokens"]) == (2.0, 0.5, "sentence", 7)
    assert (row["metric"], row["adversary"]) == ("none", "any")
    assert row["statement"].startswith("No protection")


FIRST_VERSION = """
create table releases (
    example blob not null, release text not null, mechanism text not null,
    eta real, tokens integer not null, primary key (example, release)
) without rowid
"""


def test_a_ledger_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    key = b"a".ljust(16)
    with closing(sqlite3.connect(path)) as db:
        db.execute(FIRST_VERSION)
        db.execute("insert into releases values (?, 'm/0', 'dchi', 2.0, 7)", (key,))
        db.commit()
    ledger = Ledger(path)
    assert ledger.spent().largest == Charge(eta=14.0, epsilon=None, bits=None)
    # what was released stays released: a retry is one, and another release counts
    assert reserve(ledger, "a") == 0
    with pytest.raises(Refusal, match="releases-per-example"):
        reserve(ledger, "a", release="m/1")
    assert reserve(ledger, "b", epsilon=1.0) == 1
    assert Ledger(path).spent().releases == 2


@pytest.mark.parametrize(
    "change", ["pragma user_version = 3", "create table releases (example blob, note text)"]
)
def test_a_ledger_that_cannot_be_read_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute(change)
        db.commit()
    with pytest.raises(Refusal, match="ledger: its schema"):
        Ledger(path)


def test_updates_have_their_own_account(ledger: Ledger) -> None:
    def enter(name: str, clip: float = 1.0, noise: float = 2.0) -> int:
        return ledger.reserve_update(
            name.encode(),
            mechanism="bottleneck",
            spec="f" * 64,
            round_number=1,
            clip=clip,
            noise=noise,
            examples=9,
            policy=policy(learning_rounds=3),
        )

    assert [enter("a"), enter("a"), enter("b", noise=1.0)] == [1, 0, 1]
    # sensitivity 2 clip: rho = 2 / noise^2, and it adds up
    assert ledger.spent().update_rho == pytest.approx(2 / 4 + 2 / 1)
    assert zcdp_epsilon(2.5, 1e-5) == pytest.approx(2.5 + 2 * math.sqrt(2.5 * math.log(1e5)))
    assert enter("c", clip=0.0, noise=0.0) == 1
    with pytest.raises(Refusal, match=r"policy\.learning-rounds: the run needs 4, allowed: 3"):
        enter("d")
    assert (ledger.spent().updates, ledger.spent().update_rho) == (3, None)


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
