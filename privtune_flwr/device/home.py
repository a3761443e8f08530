"""A device's folder: its secret, its identity, its ledger and its bundles.

Nothing survives in memory between two messages, so everything a device must remember is a file.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privtune_flwr.assets import cache_root
from privtune_flwr.bundle import BundleCache
from privtune_flwr.errors import PrivTuneError
from privtune_flwr.privacy.fit_ledger import FitLedger
from privtune_flwr.privacy.ledger import Ledger
from privtune_flwr.privacy.policy import DevicePolicy, load_policy

SECRET_BYTES = 32
_RUN_ID = re.compile(r"^[0-9a-f]{16,64}$")


class DeviceError(PrivTuneError):
    """A device's own folder that cannot be used."""


@dataclass(frozen=True)
class DeviceHome:
    """One device's folder.

    Attributes
    ----------
    root : Path
        The folder, readable by its owner only.
    secret : bytes
        32 bytes that never leave; noise, order and marks are keyed by them.
    device_id : str
        Public name, independent of the secret; the same over all runs of this device.
    policy : DevicePolicy
        The owner's bounds.
    bundles : BundleCache
        Bottom models and public artefacts.
    simulated : bool
        Whether this is a simulation's device.
    """

    root: Path
    secret: bytes
    device_id: str
    policy: DevicePolicy
    bundles: BundleCache
    simulated: bool

    @property
    def ledger(self) -> Ledger:
        """The account of what was released."""
        return Ledger(self.root / "ledger.sqlite")

    @property
    def fit_ledger(self) -> FitLedger:
        """The account of answers to federated baselines, in the same file."""
        return FitLedger(self.ledger.path)

    def derive(self, purpose: str) -> bytes:
        """Derive a key for one purpose from the secret (HMAC-SHA256)."""
        return hmac.new(self.secret, purpose.encode(), hashlib.sha256).digest()

    def example_key(self, text: str) -> bytes:
        """Keyed hash that names an example in the ledger without telling what it says."""
        return hmac.new(self.derive("ledger"), text.encode(), hashlib.sha256).digest()[:16]


def simulated_root(run_id: str) -> Path:
    """Folder of all simulated devices' homes of one run."""
    if not _RUN_ID.match(run_id):
        raise DeviceError("run id: not hexadecimal")
    return cache_root() / "simulated" / run_id


def open_home(
    node_config: Mapping[str, Any], *, run_id: str, simulated: bool, seed: int
) -> DeviceHome:
    """Open a device's folder, making what is missing on first use.

    Parameters
    ----------
    node_config : Mapping
        The owner's word: ``device-home`` (default ``~/.privtune``), ``policy`` and its bounds; in a
        simulation Flower's ``partition-id``.
    run_id : str
        The run; keeps simulated devices of different runs apart.
    simulated : bool
        Whether Flower's simulation runs this device. Decided by the caller from the process it is
        in, never from a message or the run configuration.
    seed : int
        A simulation's secret is derived from it so that a run can be repeated. A real device's
        secret comes from the operating system and the seed is ignored.
    """
    if simulated:
        partition = int(node_config["partition-id"])
        root = simulated_root(run_id) / f"{partition:05d}"
        bundles = BundleCache(cache_root() / "device-bundles")
        fresh = hashlib.sha256(f"simulated device {seed} {partition}".encode()).digest()
        name = f"device-{partition:05d}"
    else:
        root = Path(str(node_config.get("device-home", "~/.privtune"))).expanduser().absolute()
        bundles = BundleCache(_private_folder(root) / "bundles")
        fresh = secrets.token_bytes(SECRET_BYTES)
        name = f"device-{secrets.token_hex(8)}"
    _private_folder(root)
    return DeviceHome(
        root=root,
        secret=_read_or_make(root / "secret", fresh, SECRET_BYTES),
        device_id=_read_or_make(root / "device-id", name.encode(), None).decode(),
        policy=load_policy(node_config, simulated=simulated),
        bundles=bundles,
        simulated=simulated,
    )


def _private_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root


def _read_or_make(path: Path, fresh: bytes, size: int | None) -> bytes:
    if not path.exists():
        # written whole, then linked into place: of two processes at once, one wins and both agree
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(fresh)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            Path(temporary).unlink()
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise DeviceError(
            f"{path.name}: mode {mode:04o}, must be 0600; is someone else reading it?"
        )
    value = path.read_bytes()
    if not value or (size is not None and len(value) != size):
        raise DeviceError(f"{path.name}: damaged; restore it, a new one would release twice")
    return value
