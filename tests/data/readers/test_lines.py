"""Lines are found by number as splitting the whole file finds them; files are told by their
contents."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random

import pytest

from owlfuse.core import files
from owlfuse.core.errors import DataError
from owlfuse.core.files import expand_braces, expand_files, fingerprint
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.readers import lines
from owlfuse.data.readers.lines import JsonLines, Lines, open_records
from owlfuse.data.readers.text_table import TextTable


@pytest.mark.parametrize("chunk", [1, 2, 7, 4096])
def test_lines_are_those_of_splitting_the_whole_file_whatever_the_chunk(
    tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    rng = random.Random(chunk)
    for _ in range(60):
        pieces = [b"a", b"bc ", b" d", b"\t", b" ", b"\n", b"\r\n", b"\n\n", b"e\xc3\xa9"]
        content = b"".join(rng.choices(pieces, k=rng.randrange(30)))
        (tmp_path / "a").write_bytes(content)
        wanted = [
            (n, line.removesuffix(b"\r"))
            for n, line in enumerate(content.split(b"\n"), 1)
            if line.strip()
        ]
        found = Lines(tmp_path / "a")
        assert [(found.number(k), found[k]) for k in range(len(found))] == wanted
        assert list(found) == [line for _, line in wanted]


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_quoted_newlines_do_not_end_a_line(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(lines, "CHUNK", chunk)
    rng = random.Random(chunk)
    rows = [
        ["".join(rng.choices('ab",\n \t', k=rng.randrange(1, 6))) for _ in range(2)]
        for _ in range(200)
    ]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    (tmp_path / "a").write_bytes(text.getvalue().encode())
    found = Lines(tmp_path / "a", quoted=True)
    assert [next(csv.reader(io.StringIO(line.decode(), newline=""))) for line in found] == rows


def test_opening_reads_offsets_alone_and_a_record_reads_its_line_alone(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"id": {i}, "conversations": []}}\n' for i in range(1000))
    )
    parsed = []
    loads = json.loads
    monkeypatch.setattr(lines.json, "loads", lambda text: parsed.append(text) or loads(text))
    source = LLaVA(str(tmp_path / "a.jsonl"))
    assert len(source) == 1000
    assert parsed == []
    assert source[998].id == "a:998"
    assert len(parsed) == 1
    assert source.records.lines.starts.nbytes == 8 * 1000


def test_a_sent_source_is_its_arguments_alone_and_reads_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"id": {i}, "conversations": []}}\n' for i in range(5000))
    )
    source = LLaVA(str(tmp_path / "a.jsonl"), weight=0.5)
    source.name = "other"
    before = source[4321]
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert pickle.loads(sent)[4321] == before
    assert pickle.loads(pickle.dumps(source.records))[7]["id"] == 7


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("kind", [gzip, bz2, lzma], ids=["gzip", "bzip2", "xz"])
def test_a_compressed_file_is_told_as_such(tmp_path, name, kind):
    (tmp_path / name).write_bytes(kind.compress(b'{"conversations": []}\n' * 3))
    read = TextTable if name == "a.csv" else LLaVA
    with pytest.raises(DataError, match=f"{name}: compressed by .*; decompress it, and name"):
        len(read(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "a.jsonl: line 3: not JSON: Expecting property name"),
        ('{"a": "é"}'.encode("latin-1"), "a.jsonl: line 3: not UTF-8 at byte 7"),
        (b"[" * 100_000, "a.jsonl: line 3: not JSON: nested too deep"),
        (b"1" * 5000, "a.jsonl: line 3: not JSON: Exceeds the limit"),
    ],
)
def test_a_wrong_line_is_told_by_file_and_number_and_spares_the_others(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"\n{}\n" + line + b"\n{}")
    records = JsonLines(tmp_path / "a.jsonl")
    assert [len(records), records[0], records[2]] == [3, {}, {}]
    with pytest.raises(DataError, match=message):
        records[1]


def test_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(JsonLines(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}]')
    assert lines.read_json_records(tmp_path / "a.json") == [{"a": 1}]


def test_a_file_that_became_shorter_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 50)
    records = JsonLines(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 50: the file has become shorter"):
        records[49]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "a.jsonl: no such file"),
        ("a.json", None, "a.json: no such file"),
        ("a.jsonl", b"", "a.jsonl: holds no record"),
        ("a.jsonl", b"\n  \n", "a.jsonl: holds no record"),
        ("a.json", b"", "a.json: holds no record"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}\n', "a.json: line 2: not JSON: Extra data"),
        ("a.json", b"[" * 100_000, "a.json: line 1: not JSON: nested too deep"),
    ],
)
def test_a_file_without_records_is_told_at_first_use(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    source = LLaVA(str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        len(source)


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DataError, match="a.jsonl: Is a directory"):
        len(LLaVA(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{b,a}-{0..1}", ["b-0", "b-1", "a-0", "a-1"]),
    ],
)
def test_braces_expand_as_a_shell_does(pattern, expanded):
    assert expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["x{0..99999999999}.tar", "x{0..1000000}", 40 * "{a,b}"])
def test_braces_for_more_files_than_any_data_have_are_refused(pattern, monkeypatch):
    if "," in pattern:  # which would make as many texts
        monkeypatch.setattr("owlfuse.core.files.MAX_PATHS", 1000)
    with pytest.raises(DataError, match="stands for more than 1,000"):
        expand_braces(pattern)


@pytest.mark.parametrize("pattern", ["a", "[a]"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_file(pattern, kind, tmp_path):
    if kind == "pipe":
        os.mkfifo(tmp_path / "a")
    else:
        (tmp_path / "a").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{tmp_path}/a: a device or a pipe, expected a file"):
        expand_files(f"{tmp_path}/{pattern}")
    for read in (Lines, JsonLines, lambda file: open_records(file, bool)):
        with pytest.raises(DataError, match="a device or a pipe, expected a file"):
            read(tmp_path / "a")


def test_files_that_are_missing_are_told_and_globs_are_sorted(tmp_path):
    for name in ("b1", "b0", "a"):
        (tmp_path / name).touch()
    assert [file.name for file in expand_files(f"{tmp_path}/b*")] == ["b0", "b1"]
    assert [file.name for file in expand_files(f"{tmp_path}/{{b*,a}}")] == ["b0", "b1", "a"]
    with pytest.raises(DataError, match="b2: no such file"):
        expand_files(f"{tmp_path}/b{{0..2}}")
    with pytest.raises(DataError, match=r"c\*: no file matches"):
        expand_files(f"{tmp_path}/c*")


def test_a_fingerprint_is_the_content_up_to_a_limit_and_sizes_and_ends_above(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 1000)
    other.write_bytes(b"b" * 1000)
    assert fingerprint([one]) == hashlib.sha256(b"a" * 1000).hexdigest()
    several = fingerprint([one, other])
    assert several.startswith("files:")
    assert several != fingerprint([other, one])
    monkeypatch.setattr(files, "MAX_HASHED", 999)
    monkeypatch.setattr(files, "END_BYTES", 10)
    monkeypatch.setattr(files, "MIN_END_BYTES", 10)
    before = fingerprint([one])
    assert before.startswith("ends:")
    one.write_bytes(b"a" * 500 + b"c" + b"a" * 499)
    assert fingerprint([one]) == before
    for content in (b"a" * 1001, b"a" * 999 + b"c", b"c" + b"a" * 999):
        one.write_bytes(content)
        assert fingerprint([one]) != before
