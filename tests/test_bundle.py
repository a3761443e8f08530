"""Bundles: nothing but the promised bytes gets in, in whatever order they come."""

from __future__ import annotations

import hashlib
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from privtune_flwr.bundle import (
    BundleCache,
    BundleError,
    Manifest,
    check_bundle_id,
    count_parts,
    read_parts,
)

DIGEST = "0" * 64


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    rng = random.Random(1)
    (folder / "config.json").write_bytes(rng.randbytes(250))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(rng.randbytes(1000))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> BundleCache:
    return BundleCache(tmp_path / "cache")


def parts_of(folder: Path, size: int = 300) -> tuple[Manifest, list[bytes]]:
    manifest = Manifest.of(folder)
    return manifest, list(read_parts(folder, manifest, size))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def entry(name: str, size: object = 1, digest: str = DIGEST) -> str:
    return json.dumps([[name, size, digest]])


def test_the_id_hashes_names_sizes_and_bytes(source: Path) -> None:
    manifest = Manifest.of(source)
    assert manifest.id == hashlib.sha256(manifest.to_json().encode()).hexdigest()
    assert manifest.total_bytes == 1250
    assert Manifest.from_json(manifest.to_json()) == manifest
    (source / "config.json").write_bytes(b"x" + (source / "config.json").read_bytes()[1:])
    changed = Manifest.of(source)
    (source / "config.json").rename(source / "confih.json")
    assert len({manifest.id, changed.id, Manifest.of(source).id}) == 3


@pytest.mark.parametrize("size", [1, 299, 1250, 10_000])
def test_parts_are_the_files_one_after_the_other(source: Path, size: int) -> None:
    manifest, parts = parts_of(source, size)
    assert len(parts) == count_parts(manifest, size)
    assert b"".join(parts) == b"".join((source / n).read_bytes() for n, _, _ in manifest.files)
    assert all(len(part) == size for part in parts[:-1])


def test_parts_may_come_in_any_order_twice_and_over_restarts(
    source: Path, cache: BundleCache
) -> None:
    manifest, parts = parts_of(source)
    for number in (3, 0, 3, 4, 2, 0):
        again = BundleCache(cache.root)  # a device keeps nothing in memory
        assert not again.receive(manifest, number, len(parts), parts[number])
        assert not again.holds(manifest.id)
    assert cache.receive(manifest, 1, len(parts), parts[1])
    assert contents(cache.path(manifest.id)) == contents(source)
    assert [p.name for p in cache.root.iterdir()] == [manifest.id]
    assert cache.receive(manifest, 2, len(parts), b"held already, so not looked at")
    assert contents(cache.path(manifest.id)) == contents(source)


def test_wrong_bytes_are_refused_and_dropped(source: Path, cache: BundleCache) -> None:
    manifest, parts = parts_of(source)
    wrong = [*parts[:2], bytes(300), *parts[3:]]
    with pytest.raises(BundleError, match="does not match its hash"):
        [cache.receive(manifest, n, len(wrong), data) for n, data in enumerate(wrong)]
    assert list(cache.root.iterdir()) == []
    arrived = [cache.receive(manifest, n, len(parts), d) for n, d in enumerate(parts)]
    assert arrived == [False] * 4 + [True]


def test_more_bytes_than_promised_are_refused_and_dropped(source: Path, cache: BundleCache) -> None:
    manifest, parts = parts_of(source)
    cache.receive(manifest, 0, 5, parts[0])
    with pytest.raises(BundleError, match="more bytes"):
        cache.receive(manifest, 1, 5, bytes(951))
    assert list(cache.root.iterdir()) == []


def test_fewer_bytes_than_promised_are_refused(source: Path, cache: BundleCache) -> None:
    manifest, parts = parts_of(source)
    with pytest.raises(BundleError, match="fewer bytes"):
        cache.receive(manifest, 0, 1, parts[0])
    assert not cache.holds(manifest.id)


@pytest.mark.parametrize(("part", "parts"), [(-2, 5), (5, 5), (0, 0), (0, 100_001)])
def test_a_part_number_out_of_range_is_refused(
    source: Path, cache: BundleCache, part: int, parts: int
) -> None:
    with pytest.raises(BundleError, match="number out of range"):
        cache.receive(Manifest.of(source), part, parts, b"x")


@pytest.mark.parametrize(
    "text",
    [
        entry("../config.json"),
        entry("/config.json"),
        entry("folder/config.json"),
        entry(".hidden.json"),
        entry("config.json\n"),
        entry("model.py"),
        entry("model.bin"),
        entry("model.pkl"),
        entry("config.json", -1),
        entry("config.json", 1, "0" * 63),
        entry("config.json", 1, DIGEST + "\n"),
        entry("config.json", "many"),
        '[["config.json",Infinity,"' + DIGEST + '"]]',
        "[" * 100_000,
        json.dumps([["b.json", 1, DIGEST], ["a.json", 1, DIGEST]]),
        json.dumps([["a.json", 1, DIGEST], ["a.json", 1, DIGEST]]),
        json.dumps([["a.json", 1]]),
        "[1]",
        "1",
        "not json",
    ],
    ids=lambda text: text[:40],
)
def test_a_manifest_that_is_not_plain_names_sizes_and_hashes_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="bundle manifest"):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", ["..", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_an_id_is_64_hexadecimal_digits(cache: BundleCache, name: str) -> None:
    with pytest.raises(BundleError, match="64 hexadecimal"):
        check_bundle_id(name)
    with pytest.raises(BundleError, match="64 hexadecimal"):
        cache.holds(name)


def test_adding_a_folder_twice_keeps_one_copy(source: Path, cache: BundleCache) -> None:
    first, second = cache.add_folder(source), cache.add_folder(source)
    assert first == second
    assert [p.name for p in cache.root.iterdir()] == [first.id]
    assert contents(cache.path(first.id)) == contents(source)


def test_two_senders_at_once_both_end_with_the_bundle(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for trial in range(60):
            folder = tmp_path / f"source-{trial}"
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(os.urandom(90))
            manifest, parts = parts_of(folder, 30)

            def send(manifest: Manifest = manifest, parts: list[bytes] = parts) -> bool:
                cache = BundleCache(tmp_path / "shared")
                return [cache.receive(manifest, n, len(parts), d) for n, d in enumerate(parts)][-1]

            assert [f.result() for f in [pool.submit(send) for _ in range(4)]] == [True] * 4
            held = BundleCache(tmp_path / "shared").path(manifest.id)
            assert contents(held) == contents(folder)
