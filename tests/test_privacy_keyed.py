"""Keyed generators: real ChaCha20, repeatable elsewhere, independent between purposes."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from privtune_flwr.privacy.dchi import sample_dchi
from privtune_flwr.privacy.keyed import example_identity, keyed_generator

SECRET = bytes(range(32))
IDS = np.array([101, 7, 8, 102], dtype=np.int32)

_SCRIPT = """
import hashlib, numpy as np
from privtune_flwr.privacy.dchi import sample_dchi
from privtune_flwr.privacy.keyed import example_identity, keyed_generator
ids = np.array([101, 7, 8, 102])
rng = keyed_generator(bytes(range(32)), "spec", example_identity(ids), 0)
print(hashlib.sha256(sample_dchi(rng, 4, 384, 2.0).tobytes()).hexdigest())
"""


def _noise(secret: bytes, *identity: bytes | str | int) -> np.ndarray:
    return sample_dchi(keyed_generator(secret, *identity), 30, 384, 2.0)


def test_stream_is_chacha20_under_the_hmac_key() -> None:
    rng = keyed_generator(SECRET, "x")
    raw = rng.bit_generator.random_raw(512).astype("<u8").tobytes()

    def part(kind: bytes, payload: bytes) -> bytes:
        return kind + len(payload).to_bytes(8, "big") + payload

    message = part(b"d", b"privtune-flwr/keyed-generator/v1") + part(b"s", b"x")
    key = hmac.new(SECRET, message, hashlib.sha256).digest()
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    assert raw == cipher.update(bytes(len(raw)))


def test_same_example_same_noise_in_a_fresh_process() -> None:
    here = sample_dchi(keyed_generator(SECRET, "spec", example_identity(IDS), 0), 4, 384, 2.0)
    there = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert hashlib.sha256(here.tobytes()).hexdigest() == there


def test_noise_is_independent_between_purposes() -> None:
    other_secret = bytes([1]) + SECRET[1:]
    last_bit = SECRET[:-1] + bytes([SECRET[-1] ^ 1])
    other_example = example_identity(IDS + 1)
    example = example_identity(IDS)
    draws = [
        _noise(SECRET, "spec", example, 0),
        _noise(SECRET, "spec", example, 1),
        _noise(SECRET, "spec", other_example, 0),
        _noise(SECRET, "spec2", example, 0),
        _noise(other_secret, "spec", example, 0),
        _noise(last_bit, "spec", example, 0),
    ]
    correlation = np.corrcoef([d.ravel() for d in draws])
    off = correlation[~np.eye(len(draws), dtype=bool)]
    assert np.abs(off).max() < 5 / np.sqrt(draws[0].size)


def test_positions_are_independent() -> None:
    noise = _noise(SECRET, "spec", example_identity(IDS))
    correlation = np.corrcoef(noise)
    assert np.abs(correlation[~np.eye(len(noise), dtype=bool)]).max() < 5 / np.sqrt(384)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab",), ("a", "b")),
        ((1,), ("1",)),
        ((b"1",), ("1",)),
        ((12, 3), (1, 23)),
        (("a", ""), ("a",)),
    ],
)
def test_identities_do_not_collide(
    one: tuple[str | int | bytes, ...], other: tuple[str | int | bytes, ...]
) -> None:
    first = keyed_generator(SECRET, *one).bit_generator.random_raw(4)
    assert (first != keyed_generator(SECRET, *other).bit_generator.random_raw(4)).all()


def test_example_identity_is_content() -> None:
    assert example_identity([1, 2]) == hashlib.sha256(b"\1\0\0\0\2\0\0\0").digest()
    assert example_identity(np.array([1, 2], dtype=np.int64)) == example_identity([1, 2])
    assert example_identity([1, 2]) != example_identity([2, 1])
    with pytest.raises(ValueError, match="one dimension"):
        example_identity([[1, 2]])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keyed_generator(b"short", "x")
    with pytest.raises(ValueError, match="identity"):
        keyed_generator(SECRET)
    with pytest.raises(TypeError):
        keyed_generator(SECRET, True)
    with pytest.raises(TypeError):
        keyed_generator(SECRET, 1.5)  # type: ignore[arg-type]
