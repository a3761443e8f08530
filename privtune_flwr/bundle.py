"""Bundles: folders of files named by the hash of their content.

A bottom model or a mechanism's public artefact travels as a bundle, in parts, and is cached on the
device's disk under its id. The id fixes every byte, so a cache can be shared and a retry resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from privtune_flwr.errors import PrivTuneError

# a bundle holds plain data only: no code, no pickles, no sub-folders
_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,80}\.(json|safetensors|txt|model|jinja)$")
_ID = re.compile(r"^[0-9a-f]{64}$")


class BundleError(PrivTuneError):
    """A bundle that is malformed, too large or does not hash to its id."""


@dataclass(frozen=True)
class Manifest:
    """Names, sizes and hashes of a bundle's files, in order of name."""

    files: tuple[tuple[str, int, str], ...]

    @property
    def id(self) -> str:
        """Hash of the manifest, and so of all content: 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self.files)

    def to_json(self) -> str:
        """Canonical text of the manifest."""
        return json.dumps([list(entry) for entry in self.files], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse and check a manifest from the network.

        Raises
        ------
        BundleError
            On anything but a list of safe names, sizes and hashes in order.
        """
        try:
            files = tuple((str(n), int(s), str(h)) for n, s, h in json.loads(text))
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise BundleError("bundle manifest: not a list of name, size, hash") from None
        for name, size, digest in files:
            if not _NAME.fullmatch(name) or size < 0 or not _ID.fullmatch(digest):
                raise BundleError("bundle manifest: a file name, size or hash is not allowed")
        if [f[0] for f in files] != sorted({f[0] for f in files}):
            raise BundleError("bundle manifest: names must be sorted and distinct")
        return cls(files)

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """Hash the files of a folder."""
        files = sorted(p for p in folder.iterdir() if p.is_file())
        return cls(tuple((p.name, p.stat().st_size, _sha256(p)) for p in files))


def check_bundle_id(bundle_id: str) -> str:
    """Return ``bundle_id`` if it is 64 hexadecimal digits, else raise :class:`BundleError`."""
    if not _ID.fullmatch(bundle_id):
        raise BundleError("bundle id: not 64 hexadecimal digits")
    return bundle_id


def read_parts(folder: Path, manifest: Manifest, part_bytes: int) -> Iterator[bytes]:
    """Yield a bundle's bytes, file after file, in parts of ``part_bytes``."""
    pending = bytearray()
    for name, _, _ in manifest.files:
        with (folder / name).open("rb") as file:
            while block := file.read(part_bytes - len(pending)):
                pending += block
                if len(pending) == part_bytes:
                    yield bytes(pending)
                    pending.clear()
    if pending or manifest.total_bytes == 0:
        yield bytes(pending)


def count_parts(manifest: Manifest, part_bytes: int) -> int:
    """Parts that :func:`read_parts` yields."""
    return max(1, -(-manifest.total_bytes // part_bytes))


class BundleCache:
    """Bundles on a device's disk: complete and verified, or still arriving."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, bundle_id: str) -> Path:
        """Folder of a complete bundle, whether or not it is there."""
        return self.root / check_bundle_id(bundle_id)

    def holds(self, bundle_id: str) -> bool:
        """Whether the bundle is there, complete and verified when it arrived."""
        return self.path(bundle_id).is_dir()

    def _incoming(self, bundle_id: str) -> Path:
        return self.root / f"incoming-{check_bundle_id(bundle_id)}"

    def receive(self, manifest: Manifest, part: int, parts: int, data: bytes) -> bool:
        """Keep one part; verify and publish the bundle once all are there.

        Parameters
        ----------
        manifest : Manifest
            What the bundle must contain.
        part, parts : int
            Number of this part, from 0, and of all.
        data : bytes
            Its bytes.

        Returns
        -------
        bool
            Whether the bundle is now complete.

        Raises
        ------
        BundleError
            If sizes or hashes disagree. The parts are dropped then.
        """
        if self.holds(manifest.id):
            return True
        if not 0 <= part < parts <= 100_000:
            raise BundleError("bundle part: number out of range")
        try:
            return self._keep(manifest, part, parts, data)
        except (FileNotFoundError, FileExistsError):
            # another process published the bundle and cleared away what had arrived
            if not self.holds(manifest.id):
                raise
            return True

    def _keep(self, manifest: Manifest, part: int, parts: int, data: bytes) -> bool:
        incoming = self._incoming(manifest.id)
        incoming.mkdir(exist_ok=True)
        _write_atomically(incoming / f"{part:06d}", data)
        present = sorted(p for p in incoming.iterdir() if not p.name.startswith("."))
        if sum(p.stat().st_size for p in present) > manifest.total_bytes:
            shutil.rmtree(incoming, ignore_errors=True)
            raise BundleError("bundle: more bytes than its manifest says")
        if len(present) < parts:
            # not "False": another process may have published it since
            return self.holds(manifest.id)
        self._publish(manifest, present)
        shutil.rmtree(incoming, ignore_errors=True)
        return True

    def _publish(self, manifest: Manifest, parts: list[Path]) -> None:
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
        try:
            stream = _Stream(parts)
            for name, size, digest in manifest.files:
                stream.copy(size, staging / name)
                if _sha256(staging / name) != digest:
                    shutil.rmtree(parts[0].parent, ignore_errors=True)
                    raise BundleError(f"bundle: {name} does not match its hash")
            try:
                staging.rename(self.path(manifest.id))
            except OSError:
                # another process published the same bytes first
                if not self.holds(manifest.id):
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def add_folder(self, folder: Path) -> Manifest:
        """Copy a folder in as a bundle and return its manifest."""
        manifest = Manifest.of(folder)
        if not self.holds(manifest.id):
            staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=self.root))
            shutil.copytree(folder, staging, dirs_exist_ok=True)
            try:
                staging.rename(self.path(manifest.id))
            except OSError:
                shutil.rmtree(staging, ignore_errors=True)
                if not self.holds(manifest.id):
                    raise
        return manifest


class _Stream:
    """Reads a sequence of files as one, in pieces."""

    def __init__(self, parts: list[Path]) -> None:
        self._blocks = iter(parts)
        self._rest = memoryview(b"")

    def copy(self, size: int, target: Path) -> None:
        with target.open("wb") as out:
            while size:
                if not self._rest:
                    part = next(self._blocks, None)
                    if part is None:
                        raise BundleError("bundle: fewer bytes than its manifest says")
                    self._rest = memoryview(part.read_bytes())
                    continue
                piece = self._rest[:size]
                out.write(piece)
                self._rest = self._rest[len(piece) :]
                size -= len(piece)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(temporary).replace(path)
