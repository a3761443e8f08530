"""The device's account of what it has released, and how often.

One row for each example and each *distinct* release: asking twice for the same bytes spends
nothing more. Examples are named by a keyed hash, so that the file tells nobody what was in them.
The view ``account`` shows each row beside what its mechanism promises, in which metric and against
whom. Updates of learning phases have a table of their own: they are about all of a device's text.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.accounting import Charge, charge_of, total, update_rho
from privtune_flwr.privacy.base import Mechanism, Strength
from privtune_flwr.privacy.policy import DevicePolicy

VERSION = 2

_RELEASES = """
create table if not exists releases (
    example blob not null,          -- keyed hash of the text
    release text not null,          -- bottom model, mechanism specification, cut-off, epoch
    mechanism text not null,
    eta real,                       -- largest effective eta of a token; null = no guarantee
    tokens integer not null,
    epsilon real,                   -- of a token or a sentence; null = no guarantee
    delta real not null default 0,
    bits real,                      -- most that a token's row can carry; null = no bound
    per text not null default 'token',
    spec text not null default '',  -- id of the specification
    primary key (example, release)
) without rowid
"""
_MECHANISMS = """
create table if not exists mechanisms (
    spec text primary key,
    mechanism text not null,
    metric text not null,
    adversary text not null,
    statement text not null
) without rowid
"""
_UPDATES = """
create table if not exists updates (
    identity blob primary key,      -- hash of specification, round, state, settings and data
    mechanism text not null,
    spec text not null,
    round integer not null,
    clip real not null,             -- 0 = not clipped
    noise real not null,            -- noise multiplier
    examples integer not null
) without rowid
"""
_ACCOUNT = """
create view if not exists account as
    select r.*, m.metric, m.adversary, m.statement
    from releases r left join mechanisms m on m.spec = r.spec
"""
# what the first version lacked; its rows said eta only
_MIGRATION = (
    "alter table releases add column epsilon real",
    "alter table releases add column delta real not null default 0",
    "alter table releases add column bits real",
    "alter table releases add column per text not null default 'token'",
    "alter table releases add column spec text not null default ''",
)
_FIRST_COLUMNS = ["example", "release", "mechanism", "eta", "tokens"]


@dataclass(frozen=True)
class Spent:
    """Totals of a device over all runs; None once anything left that has no bound.

    Attributes
    ----------
    examples, releases, max_releases_per_example : int
    eta_sum_max : float or None
        The largest sum of eta over the releases of one example, of one token of it.
    largest : Charge
        The largest totals of one example over its tokens and releases, each currency on its own.
    updates : int
        Learned updates.
    update_rho : float or None
        Their zCDP by composition, for any other content of the device with as many examples.
    """

    examples: int
    releases: int
    max_releases_per_example: int
    eta_sum_max: float | None
    largest: Charge
    updates: int
    update_rho: float | None


class Ledger:
    """Releases of one device, in an SQLite file that only its owner can read.

    A ledger of an earlier version is brought up to date when it is opened.

    Raises
    ------
    Refusal
        If the file was written by a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with self._open() as db:
            if _version(db) != VERSION:
                with _writing(db):
                    _bring_up_to_date(db)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    def reserve(
        self,
        examples: Sequence[bytes],
        tokens: Sequence[int],
        *,
        release: str,
        mechanism: Mechanism,
        policy: DevicePolicy,
    ) -> int:
        """Enter a release before it leaves, or refuse it whole.

        Parameters
        ----------
        examples, tokens : sequences of equal length
            Keyed hash and token count of each example.
        release : str
            What makes a release distinct: bottom model, specification, cut-off and epoch.
        mechanism : Mechanism
            Its strength is what each token or sentence is charged.
        policy : DevicePolicy
            Its ``releases-per-example`` and ``budget-*`` are the bounds.

        Returns
        -------
        int
            Releases that are new; 0 for a pure retry.

        Raises
        ------
        Refusal
            If one example would be released too often or beyond a budget. Nothing is entered
            then.
        """
        strength, promise, spec = mechanism.strength, mechanism.guarantee(), mechanism.spec.id
        entry = (mechanism.name, strength.eta)
        rest = (strength.epsilon, strength.delta, strength.bits, strength.per, spec)
        with self._open() as db, _writing(db):
            db.execute(
                "insert or ignore into mechanisms values (?, ?, ?, ?, ?)",
                (spec, mechanism.name, promise.metric, promise.adversary, promise.statement),
            )
            new = 0
            for example, count in zip(examples, tokens, strict=True):
                cursor = db.execute(
                    "insert or ignore into releases values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (example, release, *entry, int(count), *rest),
                )
                if cursor.rowcount:
                    new += 1
                    charges = _charges(db, example)
                    policy.check_releases(len(charges))
                    policy.check_budget(charges)
        return new

    def reserve_update(
        self,
        identity: bytes,
        *,
        mechanism: str,
        spec: str,
        round_number: int,
        clip: float,
        noise: float,
        examples: int,
        policy: DevicePolicy,
    ) -> int:
        """Enter a learned update before it leaves, or refuse it.

        Parameters
        ----------
        identity : bytes
            Hash of all that determines the update; another state or other data is another update.
        mechanism, spec : str
            Name, and id of the draft specification.
        round_number : int
            From 1.
        clip, noise : float
            Largest norm, and noise multiplier.
        examples : int
            Examples that it was learned from.
        policy : DevicePolicy
            Its ``learning-rounds`` counts all updates in this ledger.

        Returns
        -------
        int
            1 if it is new, 0 for a retry.

        Raises
        ------
        Refusal
            Naming the bound. Nothing is entered then.
        """
        with self._open() as db, _writing(db):
            cursor = db.execute(
                "insert or ignore into updates values (?, ?, ?, ?, ?, ?, ?)",
                (identity, mechanism, spec, round_number, clip, noise, examples),
            )
            (updates,) = db.execute("select count(*) from updates").fetchone()
            policy.check_learning(int(updates), clip, noise)
            return int(cursor.rowcount)

    def spent(self) -> Spent:
        """Sum the account up, by basic composition; updates by that of zCDP."""
        with self._open() as db:
            rows = db.execute(
                "select example, eta, epsilon, delta, bits, per, tokens from releases"
            ).fetchall()
            updates = db.execute("select clip, noise from updates").fetchall()
        charges: dict[bytes, list[Charge]] = {}
        a_token: dict[bytes, list[Charge]] = {}
        for example, *row in rows:
            charges.setdefault(example, []).append(_charge(row))
            a_token.setdefault(example, []).append(_charge([*row[:-1], 1]))
        rhos = [update_rho(clip, noise) for clip, noise in updates]
        return Spent(
            examples=len(charges),
            releases=len(rows),
            max_releases_per_example=max((len(c) for c in charges.values()), default=0),
            eta_sum_max=_largest(total(c) for c in a_token.values()).eta,
            largest=_largest(total(c) for c in charges.values()),
            updates=len(updates),
            update_rho=None if None in rhos else sum(r for r in rhos if r is not None),
        )


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("pragma user_version").fetchone()
    return int(version)


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    version = _version(db)
    if version == VERSION:
        # another process was first
        return
    columns = [row[1] for row in db.execute("pragma table_info(releases)")]
    if version != 0 or (columns and columns != _FIRST_COLUMNS):
        raise Refusal(
            f"ledger: its schema is of version {version}, this app reads 0 to {VERSION}; "
            "nothing is released without an account"
        )
    for statement in _MIGRATION if columns else (_RELEASES,):
        db.execute(statement)
    for statement in (_MECHANISMS, _UPDATES, _ACCOUNT):
        db.execute(statement)
    db.execute(f"pragma user_version = {VERSION}")


@contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
    # taken for writing at once: two messages at a time must not both pass the bound
    db.execute("begin immediate")
    try:
        yield
    except BaseException:
        db.execute("rollback")
        raise
    db.execute("commit")


def _charges(db: sqlite3.Connection, example: bytes) -> list[Charge]:
    """Charge every release of one example."""
    rows = db.execute(
        "select eta, epsilon, delta, bits, per, tokens from releases where example = ?", (example,)
    )
    return [_charge(row) for row in rows.fetchall()]


def _charge(row: Sequence[object]) -> Charge:
    eta, epsilon, delta, bits, per, tokens = row
    strength = Strength(
        eta=_number(eta),
        epsilon=_number(epsilon),
        delta=_number(delta) or 0.0,
        bits=_number(bits),
        per="sentence" if per == "sentence" else "token",
    )
    return charge_of(strength, int(str(tokens)))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _largest(charges: Iterator[Charge]) -> Charge:
    """Take the largest of each currency; unbounded if one is."""
    etas, epsilons, deltas, bits = [0.0], [0.0], [0.0], [0.0]
    unbounded: set[str] = set()
    for charge in charges:
        deltas.append(charge.delta)
        for name, value, kept in (
            ("eta", charge.eta, etas),
            ("epsilon", charge.epsilon, epsilons),
            ("bits", charge.bits, bits),
        ):
            if value is None:
                unbounded.add(name)
            else:
                kept.append(value)
    return Charge(
        eta=None if "eta" in unbounded else max(etas),
        epsilon=None if "epsilon" in unbounded else max(epsilons),
        delta=max(deltas),
        bits=None if "bits" in unbounded else max(bits),
    )
