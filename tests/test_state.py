"""Files that are whole or absent."""

from __future__ import annotations

import os
import re
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from dataflex.errors import CheckpointError, ComponentError, DataError
from dataflex.method import Method
from dataflex.state import load_state, read_json, replacing, save_state

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | arrays(scalar_dtypes(), array_shapes(min_dims=0, min_side=0, max_side=3))
)
KEYS = st.text(max_size=5).filter(lambda key: key != "__array__")
STATES = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)),
    max_size=4,
)


def same(a, b):
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@given(state=STATES)
def test_a_state_comes_back_exactly(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("state")
    save_state(folder, "mixer", state)
    assert same(state, load_state(folder, "mixer"))
    assert sorted(path.name for path in folder.iterdir()) == ["mixer.json", "mixer.npz"]


def test_numpy_scalars_come_back_as_numbers(tmp_path):
    save_state(tmp_path, "x", {"a": np.float64(0.1), "b": np.int64(2**62), "c": np.bool_(True), "d": np.float32(0.1)})
    assert load_state(tmp_path, "x") == {"a": 0.1, "b": 2**62, "c": True, "d": float(np.float32(0.1))}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"a": {"b": [1, {2, 3}]}}, r"state x\.a\.b\[1\]: a set cannot be saved"),
        ({"a": (1, 2)}, r"state x\.a: a tuple cannot be saved"),
        ({"a": {1: 2}}, r"state x\.a: key 1 cannot be saved"),
        ({"__array__": 1}, "key '__array__' cannot be saved"),
        ({"a": np.array([object()])}, r"state x\.a: a ndarray cannot be saved"),
        ({"a": b"bytes"}, r"state x\.a: a bytes cannot be saved"),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path, bad, told):
    with pytest.raises(ComponentError, match=told):
        save_state(tmp_path, "x", bad)


def test_broken_states_are_told(tmp_path):
    save_state(tmp_path, "x", {"a": np.arange(3)})
    text, data = (tmp_path / "x.json").read_text(), (tmp_path / "x.npz").read_bytes()

    def expect(told):
        with pytest.raises(CheckpointError, match=told):
            load_state(tmp_path, "x")
        (tmp_path / "x.json").write_text(text)
        (tmp_path / "x.npz").write_bytes(data)

    (tmp_path / "x.json").write_text(text[:-20])
    expect(r"x\.json is broken")
    (tmp_path / "x.json").write_text("[]")
    expect(r"x\.json is broken")
    (tmp_path / "x.json").write_text(text.replace('"format": 1', '"format": 7'))
    expect(r"x\.json has format 7; this version reads 1")
    (tmp_path / "x.json").write_text(text.replace('"a0"', '"a1"'))
    expect("is broken: KeyError")
    (tmp_path / "x.npz").write_bytes(data[: len(data) // 2])
    expect(r"x\.npz is broken")
    (tmp_path / "x.npz").write_bytes(b"")
    expect(r"x\.npz is broken")
    (tmp_path / "x.npz").unlink()
    expect(r"x\.npz is missing")
    (tmp_path / "x.json").unlink()
    expect(r"x\.json is missing")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "report.txt"
    with replacing(path) as file:
        file.write(b"one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    for kind, told in ((DataError, f"cannot write {path}: disk full"), (None, "disk full")):
        with pytest.raises(kind or OSError, match=re.escape(told)), replacing(path, kind) as file:
            file.write(b"other")
        assert path.read_bytes() == b"one\r\ntwo\n"
        assert [p.name for p in tmp_path.iterdir()] == ["report.txt"]


class Kept(Method):
    name = "kept"
    saved = ("turn", "bias", "names", "mean")
    turn, bias, names, mean = None, 1.0, (), None


@pytest.mark.parametrize("values", [{"turn": 0, "bias": 0.0}, {"bias": 0.0, "mean": np.zeros(2)}, {"names": ("a",)}])
def test_attributes_are_saved_whichever_of_them_are_zero_or_not_there_yet(values):
    method, resumed = Kept(None), Kept(None)
    for name, value in values.items():
        setattr(method, name, value)
    resumed.load_state_dict(method.state_dict())
    for name in Kept.saved:
        np.testing.assert_array_equal(getattr(resumed, name), getattr(method, name))


def test_nothing_is_saved_while_nothing_is_there():
    class Empty(Kept):
        saved = ("turn", "names", "mean")

    assert Empty(None).state_dict() == {}
    assert Method(None).state_dict() == {}


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\xff"], ids=["too deep", "broken", "not UTF-8"])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"deep|Expecting|decode"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"x": [1, null]}')
    assert read_json(tmp_path / "a.json") == {"x": [1, None]}
