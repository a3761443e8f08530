"""The device's account of federated baselines: one row for each distinct answer.

It lies in the same file as the releases. An answer is about all of a device's text, so it has no
row for each example; what it promises an example is the epsilon of the whole run, or nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privtune_flwr.errors import Refusal
from privtune_flwr.privacy.policy import DevicePolicy

_FITS = """
create table if not exists fits (
    identity blob primary key,      -- keyed hash of settings, round, state and data
    run text not null,              -- hash of the run's settings: runs with the same ones compose
    shares text not null,           -- weights, adapters, prompt, losses, logits, gradients
    round integer not null,
    epsilon real,                   -- of an example over the whole run; null = no guarantee
    delta real not null,
    examples integer not null
) without rowid
"""


@dataclass(frozen=True)
class FitTerms:
    """What an answer is, and what it promises.

    Attributes
    ----------
    run : str
        Run and settings: rows of one run share one epsilon.
    shares : str
        What leaves.
    round : int
    epsilon : float or None
        Of an example, over the whole run; None = no guarantee.
    delta : float
    examples : int
        Examples that it was computed from.
    """

    run: str
    shares: str
    round: int
    epsilon: float | None
    delta: float
    examples: int


@dataclass(frozen=True)
class SpentFits:
    """Totals over all runs: answers, and epsilon by basic composition (None = no bound)."""

    fits: int
    epsilon: float | None
    delta: float


class FitLedger:
    """Answers of one device, beside its releases.

    Parameters
    ----------
    path : Path
        The device's ledger, which :class:`~.ledger.Ledger` has made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._open() as db:
            db.execute(_FITS)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    def reserve(self, identity: bytes, terms: FitTerms, policy: DevicePolicy) -> int:
        """Enter an answer before it leaves, or refuse it.

        Returns
        -------
        int
            1 if it is new, 0 for a retry.

        Raises
        ------
        Refusal
            Naming the bound. Nothing is entered then.
        """
        with self._open() as db:
            db.execute("begin immediate")
            try:
                cursor = db.execute(
                    "insert or ignore into fits values (?, ?, ?, ?, ?, ?, ?)",
                    (
                        identity,
                        terms.run,
                        terms.shares,
                        terms.round,
                        terms.epsilon,
                        terms.delta,
                        terms.examples,
                    ),
                )
                (count,) = db.execute("select count(*) from fits").fetchone()
                policy.check_fit(terms.shares, int(count), terms.epsilon)
                if terms.epsilon is not None:
                    _check_round(db, terms)
            except BaseException:
                db.execute("rollback")
                raise
            db.execute("commit")
            return int(cursor.rowcount)

    def spent(self) -> SpentFits:
        """Sum up over runs."""
        with self._open() as db:
            (count,) = db.execute("select count(*) from fits").fetchone()
            runs = db.execute(
                "select max(epsilon), max(delta), count(*) - count(epsilon) from fits group by run"
            ).fetchall()
        unbounded = any(missing for _, _, missing in runs)
        return SpentFits(
            fits=int(count),
            epsilon=None if unbounded else sum(float(e) for e, _, _ in runs),
            delta=sum(float(d) for _, d, _ in runs),
        )


def _check_round(db: sqlite3.Connection, terms: FitTerms) -> None:
    """Refuse a second, different answer in one round: the run's epsilon counts one a round."""
    # nor one in an earlier round: only the last answer is kept, byte for byte, for a retry
    (answers,) = db.execute(
        "select count(*) from fits where run = ? and round >= ?", (terms.run, terms.round)
    ).fetchone()
    if int(answers) > 1:
        raise Refusal(
            f"request.round = {terms.round}: another answer has left in it or after it, and the "
            "run's epsilon holds for one a round"
        )
