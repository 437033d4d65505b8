"""Files that are whole or absent."""

from __future__ import annotations

import json
import os
import re
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from dataflex import state as module
from dataflex.errors import CheckpointError, ComponentError, DataError
from dataflex.state import load_state, replacing, save_state, verify_directory, write_directory

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


def fill_with(**files):
    def fill(folder):
        for name, content in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)

    return fill


def content_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_directory_is_written_whole_and_replaced_whole(tmp_path):
    final = tmp_path / "deep" / "dataflex"
    write_directory(final, fill_with(a="1", sub__b="2"))
    manifest = verify_directory(final)
    assert list(manifest["files"]) == ["a", "sub/b"]
    assert manifest["files"]["a"]["size"] == 1
    assert stat.S_IMODE(final.stat().st_mode) == 0o777 & ~_umask()
    write_directory(final, fill_with(c="3"))
    found = content_of(final)
    assert set(found) == {"c", "manifest.json"}
    assert set(verify_directory(final)["files"]) == {"c"}
    assert [p.name for p in final.parent.iterdir()] == ["dataflex"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_failing_fill_leaves_the_old_directory(tmp_path):
    final = tmp_path / "dataflex"
    write_directory(final, fill_with(a="1"))

    def fill(folder):
        (folder / "a").write_text("2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(final, fill)
    assert content_of(final)["a"] == "1"
    verify_directory(final)
    assert [p.name for p in tmp_path.iterdir()] == ["dataflex"]


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_old_new_or_none(tmp_path, monkeypatch):
    """Die before the n-th file system call, without cleaning up, for every n."""
    names = [(os, "fsync"), (os, "rename"), (module.shutil, "rmtree")]
    originals = {name: getattr(owner, name) for owner, name in names}
    outcomes = set()
    for n in range(40):
        final = tmp_path / str(n) / "dataflex"
        write_directory(final, fill_with(a="old", b="old"))
        calls = 0

        def dying(name, limit=n):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > limit:
                    if name == "rmtree":  # killed half way through
                        for path in [path for path in args[0].rglob("*") if path.is_file()][:1]:
                            path.unlink()
                    raise Killed
                return originals[name](*args, **kwargs)

            return call

        for owner, name in names:
            monkeypatch.setattr(owner, name, dying(name))
        try:
            write_directory(final, fill_with(a="new", b="new"))
            finished = True
        except Killed:
            finished = False
        finally:
            monkeypatch.undo()
        if final.exists():
            verify_directory(final)
            found = content_of(final)
            assert found["a"] == found["b"]
            outcomes.add(found["a"])
        else:
            outcomes.add("none")
        # Whatever was left, the next write puts it right.
        write_directory(final, fill_with(a="next"))
        assert verify_directory(final)["files"].keys() == {"a"}
        assert [p.name for p in final.parent.iterdir()] == ["dataflex"]
        if finished:
            break
    assert finished
    assert outcomes == {"old", "new", "none"}


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(module, "fsync", lambda path: done.append(path.name))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    write_directory(tmp_path / "d", fill_with(a="1", sub__b="2"))
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    assert sorted(before) == sorted(["a", "b", "manifest.json", "sub", ".d.new-aside"])
    assert after == [tmp_path.name]


def test_verify_names_the_broken_file(tmp_path):
    final = tmp_path / "dataflex"

    def broken(change, told):
        write_directory(final, fill_with(a="one", sub__b="two"))
        change()
        with pytest.raises(CheckpointError, match=told):
            verify_directory(final)

    broken(lambda: (final / "a").write_text("onE"), r"dataflex/a is broken: its content is not what was written")
    broken(lambda: (final / "a").write_text("on"), r"dataflex/a is broken: 2 bytes, 3 were written")
    broken(lambda: (final / "sub" / "b").unlink(), r"dataflex/sub/b is missing")
    broken(lambda: (final / "manifest.json").unlink(), r"manifest\.json is missing: the directory was not written")
    broken(lambda: (final / "manifest.json").write_text("{"), r"manifest\.json is broken")
    broken(lambda: (final / "manifest.json").write_text('{"format": 1, "files": 3}'), r"manifest\.json is broken")
    broken(lambda: (final / "manifest.json").write_text('{"format": 2}'), "has format 2; this version reads 1")
    with pytest.raises(CheckpointError, match="is missing"):
        verify_directory(tmp_path / "nowhere")


def test_manifest_hashes_are_blake2b(tmp_path):
    import hashlib

    write_directory(tmp_path / "d", fill_with(a="one"))
    entry = json.loads((tmp_path / "d" / "manifest.json").read_text())["files"]["a"]
    assert entry == {"size": 3, "blake2b": hashlib.blake2b(b"one", digest_size=16).hexdigest()}


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*dataflex"):
        write_directory(tmp_path / "file" / "dataflex", fill_with(a="1"))


def test_fill_must_not_write_the_manifest(tmp_path):
    with pytest.raises(AssertionError):
        write_directory(tmp_path / "d", lambda folder: (folder / "manifest.json").write_text("{}"))
    assert not list(tmp_path.iterdir())


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
