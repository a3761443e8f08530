"""What a device does to an update of a learning phase before it leaves: clip it, add its own noise.

The same functions serve devices under Flower and studies in one process.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privtune_flwr.privacy.accounting import REPORT_DELTA, update_rho, zcdp_epsilon
from privtune_flwr.privacy.base import MechanismError
from privtune_flwr.privacy.learning import State


def check_change(change: Mapping[str, NDArray[np.float32]], state: State) -> State:
    """Give a change as float32 arrays in order of name, if it fits the state.

    Raises
    ------
    MechanismError
        If a name, shape or type is not the state's, or a number is not finite.
    """
    if set(change) != set(state):
        raise MechanismError("update: its names are not those of the state")
    checked: State = {}
    for name in sorted(state):
        value = np.asarray(change[name])
        if value.shape != state[name].shape or value.dtype != np.float32:
            raise MechanismError(f"update: array {name} must be float32 {state[name].shape}")
        if not np.isfinite(value).all():
            raise MechanismError(f"update: array {name} is not finite; nothing leaves")
        checked[name] = value
    return checked


def norm_of(change: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm over all arrays together."""
    return math.sqrt(
        math.fsum(float(np.square(v, dtype=np.float64).sum()) for v in change.values())
    )


def privatise(
    change: State, *, clip: float, noise: float, rng: np.random.Generator | None
) -> State:
    """Clip an update to a norm and add Gaussian noise to each of its numbers.

    Parameters
    ----------
    change : State
        As the learner gave it.
    clip : float
        Largest L2 norm over all arrays together; 0 = as it is.
    noise : float
        Standard deviation in units of ``clip``.
    rng : numpy.random.Generator or None
        The device's own, keyed; None only where there is no noise.

    Returns
    -------
    State
        Computed in float64 and rounded to float32, which is post-processing.

    Raises
    ------
    MechanismError
        If noise is asked for without a clip or a generator, or the result is not finite.
    """
    if noise > 0 and (clip <= 0 or rng is None):
        raise MechanismError("update: noise needs a clip above 0 and a generator")
    scale = 1.0
    if clip > 0:
        norm = norm_of(change)
        scale = min(1.0, clip / norm) if norm > 0 else 1.0
    result: State = {}
    for name in sorted(change):
        value = change[name].astype(np.float64) * scale
        if noise > 0:
            assert rng is not None
            value += rng.normal(0.0, noise * clip, size=value.shape)
        with np.errstate(over="ignore"):  # an overflow becomes inf and is refused below
            result[name] = value.astype(np.float32)
        if not np.isfinite(result[name]).all():
            raise MechanismError("update: after clipping and noise it is not finite")
    return result


def digest_of(state: Mapping[str, NDArray[np.float32]]) -> bytes:
    """Hash names, shapes and bytes of a state: SHA-256."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = np.ascontiguousarray(state[name], dtype="<f4")
        head = f"{name}:{value.shape}".encode()
        digest.update(len(head).to_bytes(8, "big") + head + value.tobytes())
    return digest.digest()


def update_identity(
    learn_key: str, round_number: int, clip: float, noise: float, *parts: bytes
) -> bytes:
    """Name an update by all that determines it.

    Noise and ledger hang on it: a retry repeats the same bytes, while another state in the same
    round, other settings or other text draw independent noise and count as another update. Were
    the noise the same, the difference of two answers would be free of it.

    Parameters
    ----------
    learn_key : str
        Bottom model, draft specification and cut-off.
    round_number : int
    clip, noise : float
    *parts : bytes
        Hash of the state, and a keyed hash of the device's text and labels.
    """
    head = f"{learn_key}/{round_number}/{clip!r}/{noise!r}".encode()
    digest = hashlib.sha256(len(head).to_bytes(8, "big") + head)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


def learning_statement(rounds: int, clip: float, noise: float) -> str:
    """Say what ``rounds`` updates of one device promise."""
    rho = update_rho(clip, noise)
    if rho is None:
        bound = f"clipped to norm {clip:g}, but without noise" if clip > 0 else "sent as they were"
        return (
            f"No guarantee for the learning phase: {rounds} updates a device were {bound}; they "
            "may tell what its text and labels are."
        )
    return (
        f"Each device's {rounds} updates are {rounds * rho:.6g}-zCDP ({rho:.6g} an update), and so "
        f"({zcdp_epsilon(rounds * rho):.6g}, {REPORT_DELTA:g})-differentially private, between any "
        "two contents of that device with the same number of examples, against everybody but "
        f"itself: clipped to L2 norm {clip:g}, with Gaussian noise of standard deviation "
        f"{noise * clip:g} of the device's own. The number of examples and the seconds it took "
        "are not protected. It holds for real arithmetic and ideal randomness; here: float64 and "
        "ChaCha20."
    )
