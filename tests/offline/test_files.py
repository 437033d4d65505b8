"""Rows of source files as they stand: the same rows as the data sets library reads, byte for byte."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.errors import DataError, UnsupportedError
from dataflex.offline.files import FileRecord, SourceRows, file_records

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
