"""The device's account of what it has released, and how often.

One row for each example and each *distinct* release: asking twice for the same bytes spends
nothing more. Examples are named by a keyed hash, so that the file tells nobody what was in them.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privtune_flwr.privacy.policy import DevicePolicy

_TABLE = """
create table if not exists releases (
    example blob not null,          -- keyed hash of the text
    release text not null,          -- bottom model, mechanism specification, epoch
    mechanism text not null,
    eta real,                       -- largest effective eta of a token; null = no guarantee
    tokens integer not null,
    primary key (example, release)
) without rowid
"""


@dataclass(frozen=True)
class Spent:
    """Totals of a device: d_chi budgets add up over tokens and over releases."""

    examples: int
    releases: int
    max_releases_per_example: int
    eta_sum_max: float | None


class Ledger:
    """Releases of one device, in an SQLite file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with self._open() as db:
            db.execute(_TABLE)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
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
        mechanism: str,
        eta: float | None,
        policy: DevicePolicy,
    ) -> int:
        """Enter a release before it leaves, or refuse it whole.

        Parameters
        ----------
        examples, tokens : sequences of equal length
            Keyed hash and token count of each example.
        release : str
            What makes a release distinct: bottom model, specification and epoch.
        mechanism : str
            The mechanism's name.
        eta : float or None
            Largest effective eta of a token; None where the mechanism guarantees nothing.
        policy : DevicePolicy
            Its ``releases-per-example`` is the bound.

        Returns
        -------
        int
            Releases that are new; 0 for a pure retry.

        Raises
        ------
        Refusal
            If one example would be released too often. Nothing is entered then.
        """
        with self._open() as db:
            # taken for writing at once: two messages at a time must not both pass the bound
            db.execute("begin immediate")
            try:
                new = 0
                for example, count in zip(examples, tokens, strict=True):
                    cursor = db.execute(
                        "insert or ignore into releases values (?, ?, ?, ?, ?)",
                        (example, release, mechanism, eta, int(count)),
                    )
                    if cursor.rowcount:
                        new += 1
                        (total,) = db.execute(
                            "select count(*) from releases where example = ?", (example,)
                        ).fetchone()
                        policy.check_releases(int(total))
            except BaseException:
                db.execute("rollback")
                raise
            db.execute("commit")
        return new

    def spent(self) -> Spent:
        """Sum the account up.

        Returns
        -------
        Spent
            ``eta_sum_max`` is the largest per-token sum of eta over the releases of one example
            (basic composition), None once anything left without a guarantee.
        """
        with self._open() as db:
            examples, releases = db.execute(
                "select count(distinct example), count(*) from releases"
            ).fetchone()
            per_example, eta = db.execute(
                "select max(n), max(eta) from (select count(*) n, sum(eta) eta"
                " from releases group by example)"
            ).fetchone()
            (unbounded,) = db.execute("select count(*) from releases where eta is null").fetchone()
        return Spent(
            int(examples), int(releases), int(per_example or 0), None if unbounded else eta or 0.0
        )
