"""Noise that a retry repeats: generators keyed by the device's secret and an example's identity.

A release is sent once, but a message may have to be sent again. Fresh noise on the same sentence
would let the cloud average it away, so the noise is a function of the secret, the mechanism's
specification and the example. The stream is ChaCha20 under a 256-bit key: whoever does not hold
the secret cannot tell it from a random one, and cannot undo it by guessing a seed.

The bytes repeat as long as numpy's samplers (ziggurat normals, rejection gammas) stay as they are;
numpy may change them in a new release, so a device keeps its environment while a run lasts.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
from numpy.typing import ArrayLike
from randomgen import ChaCha

SECRET_BYTES = 32
_DOMAIN = b"privtune-flwr/keyed-generator/v1"


def keyed_generator(secret: bytes, *identity: bytes | str | int) -> np.random.Generator:
    """Give the generator that belongs to one purpose, and to no other.

    Parameters
    ----------
    secret : bytes
        32 secret bytes that never leave the device.
    *identity : bytes, str or int
        What the stream is for, for example specification id, example identity and epoch. At least
        one part. Parts are encoded with their type and length, so that ``("ab", "c")`` and
        ``("a", "bc")``, or ``1`` and ``"1"``, give independent streams.

    Returns
    -------
    numpy.random.Generator
        ChaCha20 (20 rounds, counter 0, nonce 0) under the key HMAC-SHA256(secret, identity). No
        entropy of the operating system enters.

    Raises
    ------
    ValueError
        If the secret has not 32 bytes or no identity is given.
    TypeError
        If a part is none of bytes, str and int.
    """
    if not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
        raise ValueError(f"the secret must be {SECRET_BYTES} bytes")
    if not identity:
        raise ValueError("a keyed generator needs an identity: one stream serves one purpose")
    message = _prefixed(b"d", _DOMAIN) + b"".join(_encode(part) for part in identity)
    key = hmac.new(secret, message, hashlib.sha256).digest()
    # `key` (unlike `seed`) is set directly, and with it no seed sequence is made.
    bits = ChaCha(key=int.from_bytes(key, "little"), counter=0, rounds=20)
    return np.random.Generator(bits)


def example_identity(token_ids: ArrayLike) -> bytes:
    """Identify an example by its content: SHA-256 of its token ids as little-endian int32.

    Two devices, or two positions in one data set, that hold the same sentence get the same
    identity; what keeps their noise apart is the secret, or a further part of the identity.

    Parameters
    ----------
    token_ids : array of int, shape (T,)
        One sentence without padding.

    Returns
    -------
    bytes
        32 bytes. A secret-free function of the text: never send it.
    """
    ids_T = np.ascontiguousarray(token_ids, dtype="<i4")
    if ids_T.ndim != 1:
        raise ValueError(f"token ids of one sentence have one dimension, got shape {ids_T.shape}")
    return hashlib.sha256(ids_T.tobytes()).digest()


def _encode(part: bytes | str | int) -> bytes:
    if isinstance(part, bytes):
        return _prefixed(b"b", part)
    if isinstance(part, str):
        return _prefixed(b"s", part.encode())
    if isinstance(part, int) and not isinstance(part, bool):
        return _prefixed(b"i", str(part).encode())
    raise TypeError(f"a part of an identity is bytes, str or int, not {type(part).__name__}")


def _prefixed(kind: bytes, payload: bytes) -> bytes:
    return kind + len(payload).to_bytes(8, "big") + payload
