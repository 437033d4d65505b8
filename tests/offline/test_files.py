"""Rows of source files as they stand: the same rows as the data sets library reads, byte for byte."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.config import files
from dataflex.config.files import FileRecord, SourceRows, file_records
from dataflex.errors import DataError, UnsupportedError

JSONL = b'{"a": 1,  "b": "x"}\n\n{"b":"\xc3\xa9","a":2}\r\n  {"a": 3, "b": "last"}'


def test_lines_keep_their_bytes(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + JSONL)
    rows = SourceRows([source])
    assert rows.num_rows == 3
    rows.write(tmp_path / "out.jsonl", [1, 0])
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"b":"\xc3\xa9","a":2}\n{"a": 1,  "b": "x"}\n'


def test_items_of_an_array_keep_their_bytes(tmp_path):
    items = ['{"a":  "],[ \\" {"}', '{\n  "a": ["x", {"b": 1.0}]\n }', '{"a": "é"}']
    source = tmp_path / "rows.json"
    source.write_text(f" [ {items[0]} ,{items[1]},\n{items[2]}]\n", encoding="utf-8")
    rows = SourceRows([source])
    rows.write(tmp_path / "out.json", [2, 1])
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert items[2] in text
    assert items[1] in text
    assert json.loads(text) == [json.loads(items[2]), json.loads(items[1])]


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": }]', "[1,"])
def test_a_broken_array_is_told(tmp_path, text):
    source = tmp_path / "rows.json"
    source.write_text(text)
    with pytest.raises(DataError, match=r"rows\.json: malformed JSON array"):
        SourceRows([source])


def test_csv_records_may_hold_line_ends(tmp_path):
    source = tmp_path / "rows.csv"
    source.write_bytes(b'a,b\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,x\r\n')
    rows = SourceRows([source])
    assert rows.num_rows == 2
    rows.write(tmp_path / "out.csv", [1, 0])
    assert (tmp_path / "out.csv").read_bytes() == b'a,b\n2,x\n1,"two\nlines, ""quoted"""\n'


def test_text_lines_and_parquet_tables(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"one\n\nthree\n")
    lines = SourceRows([tmp_path / "rows.txt"])
    assert lines.num_rows == 3
    lines.write(tmp_path / "out.txt", [2, 1])
    assert (tmp_path / "out.txt").read_bytes() == b"three\n\n"
    for name, values in (("1", [1, 2]), ("2", [3])):
        pq.write_table(pa.table({"a": values}), tmp_path / f"{name}.parquet")
    table = SourceRows([tmp_path / "1.parquet", tmp_path / "2.parquet"])
    assert table.num_rows == 3
    table.write(tmp_path / "out.parquet", [2, 0])
    assert pq.read_table(tmp_path / "out.parquet").column("a").to_pylist() == [3, 1]


def test_counts_are_those_of_the_data_sets_library(tmp_path):
    from datasets import load_dataset

    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    (tmp_path / "rows.csv").write_bytes(b'a,b\n1,"two\nlines"\n\n2,x\n')
    (tmp_path / "rows.txt").write_bytes(b"one\n\nthree\n")
    for kind, name in (("json", "rows.jsonl"), ("csv", "rows.csv"), ("text", "rows.txt")):
        read = load_dataset(kind, data_files=[str(tmp_path / name)], split="train", cache_dir=str(tmp_path / "cache"))
        assert SourceRows([tmp_path / name]).num_rows == len(read), name


def records_of(content, ending):
    """The rows of a file that is held whole, line by line."""
    if ending == ".txt":
        return content.splitlines()
    records, pending = [], b""
    for line in content.split(b"\n"):
        pending += (b"\n" if pending else b"") + line
        if ending != ".csv" or pending.count(b'"') % 2 == 0:
            records.append(pending.rstrip(b"\r"))
            pending = b""
    return [record for record in records if record.strip()]


@given(pieces=st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n", b'"', b" ", b"bc,"]), max_size=20))
@settings(max_examples=300, deadline=None)
def test_rows_of_files_read_in_blocks(tmp_path_factory, pieces):
    folder, content = tmp_path_factory.mktemp("files"), b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_BYTES", 3)
        for ending in (".txt", ".csv", ".jsonl"):
            path = folder / f"rows{ending}"
            path.write_bytes(content)
            rows, want = SourceRows([path]), records_of(content, ending)
            head = want[:1] if ending == ".csv" else []
            assert head + [rows.row(at) for at in range(rows.num_rows)] == want, ending


def test_rows_of_several_files_are_one_after_the_other(tmp_path):
    for name, content in (("1", b"one\ntwo"), ("2", b""), ("3", b"three\n")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    rows = SourceRows([tmp_path / f"{name}.txt" for name in "123"])
    assert [rows.row(at) for at in range(rows.num_rows)] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("positions", [[0, 1, 4], [3, 3, 4], [4, 0, 0, 2], []])
def test_tables_keep_the_order_asked_for_and_their_columns(tmp_path, positions):
    schema = pa.schema({"a": pa.int64(), "b": pa.list_(pa.string())}, metadata={b"huggingface": b"{}"})
    whole = pa.table({"a": [10, 11, 12, 13, 14], "b": [["x"], [], None, ["y", "z"], []]}, schema=schema)
    for name, part in (("2", whole[:2]), ("1", whole[2:])):  # files go by the order given, not by name
        pq.write_table(part, tmp_path / f"{name}.parquet", row_group_size=2)
    rows = SourceRows([tmp_path / "2.parquet", tmp_path / "1.parquet"])
    rows.write(tmp_path / "out.parquet", positions)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.equals(whole.take(pa.array(positions, pa.int64())))
    assert found.schema.metadata == schema.metadata
    assert json.loads(rows.row(3)) == {"a": 13, "b": ["y", "z"]}


def test_tables_of_other_columns(tmp_path):
    for name, column in (("1", "a"), ("2", "b")):
        pq.write_table(pa.table({column: [1]}), tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"2\.parquet: cannot be read as parquet: its columns are not those of"):
        SourceRows([tmp_path / "1.parquet", tmp_path / "2.parquet"])


def test_what_does_not_go_together(tmp_path):
    for name in ("a.jsonl", "b.txt", "c.arrow"):
        (tmp_path / name).write_bytes(b"{}\n")
    with pytest.raises(UnsupportedError, match="several formats"):
        SourceRows([tmp_path / "a.jsonl", tmp_path / "b.txt"])
    with pytest.raises(UnsupportedError, match=r"\.arrow files cannot be written back"):
        SourceRows([tmp_path / "c.arrow"])
    for name, head in (("1.csv", b"a,b\n"), ("2.csv", b"b,a\n")):
        (tmp_path / name).write_bytes(head)
    with pytest.raises(UnsupportedError, match="different header lines"):
        SourceRows([tmp_path / "1.csv", tmp_path / "2.csv"])


def test_identities_follow_the_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    before = FileRecord.of(path)
    path.write_text("two")
    assert FileRecord.of(path).size == before.size
    assert FileRecord.of(path).blake2b != before.blake2b
    assert [record.path for record in file_records(tmp_path)] == [str(path)]
    assert file_records(None) == []
