"""Wire formats: what comes back, what it costs, what cannot be carried."""

from __future__ import annotations

import numpy as np
import pytest

from privtune_flwr.codec import CodecError, get_codec
from privtune_flwr.config import PrivacyConfig

NAMES = ("float16", "int8", "float32", "float32-padded")
LENGTHS = np.array([3, 1, 7], dtype=np.uint16)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, size=(11, 16)).astype(np.float32)


def test_every_name_that_the_configuration_allows_is_a_codec() -> None:
    annotation = PrivacyConfig.model_fields["wire"].annotation
    assert set(annotation.__args__) == set(NAMES)
    assert [get_codec(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(CodecError, match=r"privacy.wire = 'int4'.*float16, int8"):
        get_codec("int4")


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_what_encode_gives(name: str, rows: np.ndarray) -> None:
    codec = get_codec(name)
    arrays = codec.encode(rows, LENGTHS)
    said = codec.schema(LENGTHS, 16)
    assert {k: (str(v.dtype), v.shape) for k, v in arrays.items()} == said
    assert codec.decode(arrays, LENGTHS).dtype == np.float32


@pytest.mark.parametrize("name", ["float32", "float32-padded"])
def test_single_precision_is_exact(name: str, rows: np.ndarray) -> None:
    codec = get_codec(name)
    np.testing.assert_array_equal(codec.decode(codec.encode(rows, LENGTHS), LENGTHS), rows)


def test_half_precision_is_close(rows: np.ndarray) -> None:
    codec = get_codec("float16")
    back = codec.decode(codec.encode(rows, LENGTHS), LENGTHS)
    np.testing.assert_allclose(back, rows, rtol=1e-3)
    assert not np.array_equal(back, rows)


def test_int8_errs_by_half_a_step_of_its_token_at_most(rows: np.ndarray) -> None:
    rows[4] *= 1000  # a large token must not coarsen the others
    codec = get_codec("int8")
    back = codec.decode(codec.encode(rows, LENGTHS), LENGTHS)
    step = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert (np.abs(back - rows) <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_stay_zero(name: str, rows: np.ndarray) -> None:
    rows[2] = 0
    codec = get_codec(name)
    back = codec.decode(codec.encode(rows, LENGTHS), LENGTHS)
    assert np.isfinite(back).all()
    assert not back[2].any()


def test_padding_is_zero_and_follows_each_sentence(rows: np.ndarray) -> None:
    values = get_codec("float32-padded").encode(rows, LENGTHS)["values"]
    assert values.shape == (3, 7, 16)
    np.testing.assert_array_equal(values[1, 0], rows[3])
    assert not values[0, 3:].any()
    assert not values[1, 1:].any()


@pytest.mark.parametrize("value", [65_600.0, -1e6, np.inf])
def test_a_value_beyond_half_precision_is_refused(value: float, rows: np.ndarray) -> None:
    rows[1, 1] = value
    with pytest.raises(CodecError, match=r"float16.*exceeds 65504.*float32"):
        get_codec("float16").encode(rows, LENGTHS)
    if np.isfinite(value):
        arrays = get_codec("int8").encode(rows, LENGTHS)
        assert np.abs(get_codec("int8").decode(arrays, LENGTHS)).max() == pytest.approx(abs(value))


def test_smaller_formats_send_fewer_bytes(rows: np.ndarray) -> None:
    size = {n: sum(a.nbytes for a in get_codec(n).encode(rows, LENGTHS).values()) for n in NAMES}
    assert size["int8"] < size["float16"] < size["float32"] < size["float32-padded"]
    assert size["float16"] * 2 == size["float32"]
