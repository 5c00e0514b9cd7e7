"""Every mistake is told with the file, the line or record, and the turn, all counted from 1, for
every kind of file."""

import io
import json
import tarfile

import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from owlfuse.core.errors import DataError
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.parquet import Parquet
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.loading import load_or_skip


def turns(*texts):
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


GOOD = {"messages": turns("a", "b", "c", "d")}
WRONG = {  # what is read is wrong, or what is encoded
    "a role": (
        {"messages": [*turns("a", "b"), {"role": "owl", "content": "c"}]},
        "a turn is .*owl",
        3,
    ),
    "no text": (
        {"messages": [*turns("a", "b"), {"role": "user", "content": 5}]},
        "a turn is .*5",
        3,
    ),
    "a key": (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "prefix": True}]},
        "'prefix'",
        2,
    ),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}, *turns("a", "b")[1:]]},
        "a part is",
        1,
    ),
    "an order": ({"messages": [*turns("a", "b", "c"), *turns("d", "e")]}, "are both the user's", 4),
    "empty": ({"messages": turns("a", "b", "c", " ")}, "is an empty answer", 4),
    "a control token": ({"messages": turns("a", "b", "<|end|>", "d")}, "control token", 3),
    "a character": ({"messages": turns("a", "b\u0007", "c", "d")}, "control character", 2),
    "a picture": (
        {
            "messages": [*turns("a"), {"role": "assistant", "content": [{"type": "image"}]}],
            "images": ["x.png"],
        },
        "<image> in a turn of the assistant",
        2,
    ),
}


def jsonl(folder, records):
    lines = [json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    return Messages(folder / "a.jsonl"), "line 4 of a.jsonl"


def listed(folder, records):
    (folder / "a.json").write_text(json.dumps(records))
    return Messages(folder / "a.json"), "record 3 of a.json"


def table(folder, records):
    """Two files; a chat is a JSON text, since a column's rows have one type."""
    for number, part in enumerate((records[:2], records[2:])):
        rows = [{**record, "messages": json.dumps(record["messages"])} for record in part]
        rows = [{"messages": row["messages"], "images": row.get("images", [])} for row in rows]
        schema = pyarrow.schema(
            {"messages": pyarrow.string(), "images": pyarrow.list_(pyarrow.string())}
        )
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / f"a-{number}.parquet")
    return Parquet(folder / "a-*.parquet", cache_dir=str(folder / "cache")), "row 1 of a-1.parquet"


def shards(folder, records):
    for number, part in enumerate((records[:2], records[2:])):
        with tarfile.open(folder / f"a-{number}.tar", "w") as tar:
            for place, record in enumerate(part):
                content = json.dumps(record).encode()
                member = tarfile.TarInfo(f"{number}{place}.json")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return WebDataset(folder / "a-*.tar"), "sample 1 of a-1.tar"


@pytest.fixture
def encoder(shapes):
    return ChatEncoder(AutoTokenizer.from_pretrained(shapes / "tokenizer"), 1)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("write", [jsonl, listed, table, shards])
def test_a_mistake_is_told_with_its_place(write, wrong, encoder, tmp_path):
    record, message, turn = WRONG[wrong]
    source, place = write(tmp_path, [GOOD, GOOD, record, GOOD])
    with pytest.raises(DataError, match=message) as error:
        load_or_skip(lambda sample, _: encoder.encode(sample), source, 2)
    told = str(error.value)
    assert f"({place})" in told
    assert f"turn {turn}" in told or f"turns {turn - 1} and {turn}" in told
    assert "\n" not in told
