"""From a pinned archive to verified files in a folder: download, hash, extract, record."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from rich.console import Console

from privtune_flwr.assets.archives import Archive, AssetError, Member

MANIFEST = "manifest.json"
_PARTIAL = ".partial-"


def sha256_of(path: Path) -> str:
    """Hash a file.

    Returns
    -------
    str
        The SHA-256 in hexadecimal.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Show a spinner on a terminal, one plain line elsewhere (a log, a pipe, an actor)."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        print(what, file=sys.stderr, flush=True)
        yield


def download(archive: Archive, folder: Path) -> Path:
    """Let pip fetch one archive, with whatever index and proxy the user configured for it.

    Parameters
    ----------
    archive : Archive
        What to fetch.
    folder : Path
        An empty folder; the archive is written there.

    Returns
    -------
    Path
        The downloaded file. It is *not* verified yet.

    Raises
    ------
    AssetError
        If pip fails, with the last lines it printed.
    """
    # pip runs a source distribution's setup.py to learn its metadata: it does so here for the
    # snippets, which no wheel contains. That is code of a package pinned by version, run before
    # our own hash check; --no-binary names this package alone, so build tools stay wheels.
    kind = ["--no-binary", archive.project] if archive.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *kind]
    command += ["--disable-pip-version-check", "--dest", str(folder), archive.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-5:])
        hint = "is pip installed here, is the index reachable, and does it hold this version?"
        if "No module named pip" in done.stderr:
            hint = "this environment has no pip; try: python -m ensurepip"
        raise AssetError(
            f"{archive.name}: pip could not download {archive.requirement} "
            f"(exit status {done.returncode}); {hint}\n{said}"
        )
    files = list(folder.iterdir())
    if len(files) != 1:
        raise AssetError(
            f"{archive.name}: expected pip to leave one file, {archive.filename}, "
            f"found {sorted(file.name for file in files)}"
        )
    return files[0]


def check_archive(archive: Archive, file: Path) -> None:
    """Refuse an archive whose hash is not the pinned one.

    Raises
    ------
    AssetError
        With the archive's name, the hash expected and the hash found.
    """
    found = sha256_of(file)
    if found != archive.sha256:
        raise AssetError(
            f"{archive.name}: {file.name} is not the pinned archive {archive.filename}: "
            f"expected sha256 {archive.sha256}, found {found}; nothing was extracted"
        )


def install_archive(archive: Archive, file: Path, folder: Path) -> Path:
    """Verify a downloaded archive and put its members into ``folder``, all or nothing.

    Parameters
    ----------
    archive : Archive
        The pin to verify against, and the members to take.
    file : Path
        The downloaded archive; left where it is.
    folder : Path
        Where the members go, beside a ``manifest.json`` of their hashes. Must not exist.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    AssetError
        If the hash is wrong or a member is missing or unsafe. ``folder`` does not exist then.
    """
    check_archive(archive, file)
    with staged(folder) as stage:
        _extract(archive, file, stage)
        write_manifest(stage, source=archive.filename, source_sha256=archive.sha256)
    return folder


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a temporary sibling that becomes ``folder`` on success and vanishes on failure.

    A rename within one directory is atomic, so whoever sees ``folder`` sees all of it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{_PARTIAL}{folder.name}-", dir=folder.parent
    ) as outer:
        # One level down: TemporaryDirectory keeps its own folder to clean up, and mkdir (unlike
        # mkdtemp, which allows the owner only) gives the permissions that the user's umask asks.
        stage = Path(outer) / "stage"
        stage.mkdir()
        yield stage
        stage.rename(folder)


def sweep_partials(folder: Path) -> None:
    """Remove what killed processes left while making ``folder``; call with its lock held."""
    for stale in folder.parent.glob(f"{_PARTIAL}{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)


def write_manifest(folder: Path, *, source: str, source_sha256: str) -> None:
    """Record the hash of every file below ``folder``, and where they came from."""
    files = {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    manifest = {"source": source, "source_sha256": source_sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check_manifest(folder: Path) -> list[str]:
    """Hash every file again.

    Returns
    -------
    list[str]
        One line for each file that is missing or changed; empty if all is as extracted.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{MANIFEST} is missing or unreadable"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256_of(path) != expected:
            problems.append(f"{name} has changed")
    return problems


_Opener = Callable[[str], IO[bytes]]


def _extract(archive: Archive, file: Path, stage: Path) -> None:
    for within in dict.fromkeys(member.within for member in archive.members):
        members = [member for member in archive.members if member.within == within]
        if not within:
            with _opened(file) as (names, opener):
                _take(archive, members, names, opener, stage)
            continue
        nested = stage.parent / PurePosixPath(within).name
        outer = Member(source=within, target=nested.name)
        with _opened(file) as (names, opener):
            _take(archive, [outer], names, opener, stage.parent)
        with _opened(nested) as (names, opener):
            _take(archive, members, names, opener, stage)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[list[str], _Opener]]:
    """Open a wheel (zip) or a tar; only regular files are listed, so no link is followed."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as zipped:
            yield [i.filename for i in zipped.infolist() if not i.is_dir()], zipped.open
    else:
        with tarfile.open(file, "r:*") as tar:
            infos = {info.name: info for info in tar.getmembers() if info.isfile()}

            def opener(name: str) -> IO[bytes]:
                stream = tar.extractfile(infos[name])
                assert stream is not None  # isfile() above
                return stream

            yield list(infos), opener


def _take(
    archive: Archive, members: list[Member], names: list[str], opener: _Opener, stage: Path
) -> None:
    for member in members:
        folder = member.source.endswith("/")
        chosen = [
            n for n in names if (n.startswith(member.source) if folder else n == member.source)
        ]
        if not chosen:
            raise AssetError(f"{archive.name}: {archive.filename} holds no {member.source}")
        for name in chosen:
            target = member.target + name.removeprefix(member.source) if folder else member.target
            path = _inside(archive, stage, target)
            path.parent.mkdir(parents=True, exist_ok=True)
            with opener(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _inside(archive: Archive, stage: Path, target: str) -> Path:
    # Names below a folder member come from the archive: never let one climb out of the stage.
    parts = target.replace("\\", "/").split("/")
    path = (stage / target).resolve()
    if ".." in parts or not path.is_relative_to(stage.resolve()):
        raise AssetError(f"{archive.name}: {archive.filename} holds an unsafe path, {target!r}")
    return path
