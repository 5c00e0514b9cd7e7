"""A record that is too long is refused before it is read, whatever file it is in; others of the
file stay readable."""

import io
import json
import subprocess
import sys
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from owlfuse.core.errors import DataError
from owlfuse.core.files import check_record, read_json
from owlfuse.data.chat.tokenizer import read_template
from owlfuse.data.formats import parquet as parquet_source
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.parquet import Parquet
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.readers import lines, tars
from owlfuse.data.readers.lines import JsonLines, read_json_records

LIMIT = 4000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Limits that small files reach."""
    for module in (lines, tars, parquet_source):
        for name in ("MAX_RECORD", "MAX_SAMPLE", "MAX_PICTURES", "CHUNK"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 512 if name == "CHUNK" else LIMIT)
    monkeypatch.setattr(check_record, "__defaults__", (LIMIT,))


def chat(text):
    return {
        "messages": [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": text}]
    }


def jsonl(path, texts):
    path.write_text("".join(json.dumps(chat(text)) + "\n" for text in texts))
    return Messages(path)


def json_list(path, texts):
    path.write_text(json.dumps([chat(text) for text in texts], indent=1))
    return Messages(path)


def csv(path, texts):
    path.write_text("image,caption\n" + "".join(f'a.png,"{text}"\n' for text in texts))
    return Captions(path)


def tar(path, texts, extension="txt"):
    with tarfile.open(path, "w") as file:
        for number, text in enumerate(texts):
            content = json.dumps(chat(text)) if extension == "json" else text
            for name, data in (
                (f"{number}.png", b"x"),
                (f"{number}.{extension}", content.encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return WebDataset(path)


def tar_json(path, texts):
    return tar(path, texts, "json")


def table(path, texts):
    parquet.write_table(
        pyarrow.table({"messages": [chat(text)["messages"] for text in texts]}),
        path,
        row_group_size=1,
    )
    return Parquet(path, cache_dir=str(path.parent))


MANY = {"a.jsonl": jsonl, "a.csv": csv, "a.tar": tar, "b.tar": tar_json}
WHOLE = {"a.json": json_list, "a.parquet": table}


@pytest.mark.parametrize("name", MANY)
def test_a_long_record_is_refused_and_the_others_are_read(name, tmp_path):
    source = MANY[name](tmp_path / name, ["short", "long " * 1000, "short"])
    for index in (0, 2):
        source[index]
    with pytest.raises(DataError, match=r"over the limit of 4,000") as caught:
        source[1]
    assert name in str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_a_long_record_of_a_file_that_is_read_whole_is_refused_before(name, tmp_path):
    source = WHOLE[name](tmp_path / name, ["short", "long " * 1000, "short"])
    with pytest.raises(DataError, match=r"4,000") as caught:
        source[1]
    assert name in str(caught.value)


@pytest.mark.parametrize("extension", ["jpg", "mp4", "npy"])
def test_a_sample_of_a_tar_is_not_larger_than_the_limit(extension, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        member = tarfile.TarInfo(f"a.{extension}")
        member.size = LIMIT + 1
        file.addfile(member, io.BytesIO(bytes(LIMIT + 1)))
    with pytest.raises(DataError, match=f"a.{extension}: its sample has 4,001 bytes"):
        WebDataset(tmp_path / "a.tar")[0]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_json_list_that_is_read_in_pieces_is_that_which_json_reads(indent, count, tmp_path):
    records = (
        [chat('é\\"[]{},: \n' * (k % 5)) for k in range(count)]
        + [k * 1.5 for k in range(count)]
        + [None, True, "x", [], {}]
    )
    (tmp_path / "a.json").write_bytes(
        b"\xef\xbb\xbf \n"
        + json.dumps(records, indent=indent, ensure_ascii=False).encode()
        + b"\n "
    )
    padding = b" " * (LIMIT + 1)
    (tmp_path / "b.json").write_bytes(json.dumps(records, indent=indent).encode() + padding)
    assert read_json_records(tmp_path / "a.json") == records
    assert read_json_records(tmp_path / "b.json") == records
    (tmp_path / "c.json").write_bytes(padding + b"[ ]")
    assert read_json_records(tmp_path / "c.json") == []


@pytest.mark.parametrize(
    ("tail", "told"),
    [
        (b'{"a": 1} {"b": 2}]', "not JSON: Expecting ',' delimiter"),
        (b'{"a": x' + b" " * 600 + b"}]", "not JSON: Expecting value"),
        (b"[1, 2", "not JSON"),
        (b"1, ]", "not JSON: Expecting value"),
        (b"1] 2", "not JSON: Extra data"),
        (b'"\xff"]', "not UTF-8 at byte"),
        (b'"open', "not JSON: Unterminated string"),
        (b"1", "not JSON"),
        (b"[" * 3000, "not JSON"),
    ],
)
def test_a_json_list_that_is_read_in_pieces_tells_what_is_wrong_and_in_which_line(
    tail, told, tmp_path
):
    (tmp_path / "a.json").write_bytes(b"[\n" + b'{"a": "b"},\n' * 400 + tail)
    with pytest.raises(DataError, match=told) as caught:
        read_json_records(tmp_path / "a.json")
    assert "byte" in told or "line 402" in str(caught.value)


def test_other_files_of_a_run_have_a_limit_too(tmp_path):
    (tmp_path / "a.jinja").write_text("{{ 'x' }}" + " " * 2**21)
    with pytest.raises(DataError, match="chat_template: .*a.jinja: more than 1,048,576 bytes"):
        read_template(str(tmp_path / "a.jinja"))
    (tmp_path / "a.json").write_text('{"questions": []}')
    with pytest.raises(DataError, match="more than 10 bytes, the limit"):
        read_json(tmp_path / "a.json", limit=10)


def test_a_line_of_blanks_is_no_record_however_long_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"1\n" + b" " * (2 * LIMIT) + b"\n2\n")
    read = JsonLines(tmp_path / "a.jsonl")
    assert len(read) == 2
    assert read[1] == 2


MEASURE = """
import sys
from pathlib import Path
from owlfuse.training.cost import reset_peak, resident
from owlfuse.data.formats.{module} import {source}
from owlfuse.core.errors import DataError
reset_peak()
before = resident("VmRSS")
try:
    {source}(Path(sys.argv[1]))[0]
except DataError as error:
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "source", "megabytes"),
    [
        ("a.jsonl", "messages", "Messages", 50),
        ("a.csv", "captions", "Captions", 50),
        ("a.tar", "webdataset", "WebDataset", 50),
        ("a.json", "messages", "Messages", 900),
    ],
)
def test_memory_stays_small_for_a_record_of_300_mb(name, module, source, megabytes, tmp_path):
    path, size = tmp_path / name, 300 * 2**20
    with path.open("wb") as file:
        if name == "a.tar":
            member = tarfile.TarInfo("a.txt")
            member.size = size
            file.write(member.tobuf())
            file.truncate(512 + size + 1024)
        else:
            file.write(b"image,caption\na," if name == "a.csv" else b"[[")
            for _ in range(size // 2**20):
                file.write(b"[]," * 349525)
            file.write(b"0]]\n")
    code = MEASURE.format(module=module, source=source)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < megabytes * 2**20
