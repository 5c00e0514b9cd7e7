"""Parquet and Arrow: any row is reached by its number, pictures stay bytes, and what is wrong is
named."""

import os
import pickle

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chats import messages, png, turns
from owlfuse.core.errors import DataError
from owlfuse.data.formats.parquet import Parquet


def table(numbers, **columns):
    return pa.table(
        {"id": [f"n{n}" for n in numbers], "messages": [turns(n) for n in numbers], **columns}
    )


def stream(path, rows):
    with pa.ipc.new_stream(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)


def file(path, rows):
    with pa.ipc.new_file(str(path), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda path, rows: pq.write_table(rows, path), "a.parquet"),
        (stream, "a.arrow"),
        (file, "a.arrow"),
    ],
)
@pytest.mark.parametrize(
    "column",
    [
        {"image": [{"bytes": png(n), "path": f"{n}.png"} for n in range(10)]},
        {"image": [png(n) for n in range(10)]},
        {"images": [[{"bytes": png(n), "path": None}] for n in range(10)]},
    ],
)
def test_rows_of_parquet_and_arrow_have_their_pictures_as_bytes_in_any_order(
    tmp_path, write, name, column
):
    write(tmp_path / name, table(range(10), **column))
    source = Parquet(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    assert len(source) == 10
    for number in (9, 0, 4, 4):
        sample = source[number]
        assert (sample.id, sample.images, sample.messages) == (
            f"a:n{number}",
            [png(number)],
            messages(number),
        )
    assert pickle.loads(pickle.dumps(source))[3] == source[3]
    with pytest.raises(IndexError):
        source[10]


def test_what_datasets_itself_writes_is_read(tmp_path):
    rows = {
        "conversations": [turns(n, "from", "value") for n in range(4)],
        "image": [png(n) for n in range(4)],
        "x": [0] * 4,
    }
    rows["image"] = [{"bytes": raw, "path": None} for raw in rows["image"]]
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "disk", num_shards=2)
    for path in ("a.parquet", "disk"):
        source = Parquet(str(tmp_path / path), cache_dir=str(tmp_path / "cache"))
        assert [source[n].images for n in range(4)] == [[png(n)] for n in range(4)]
        assert [source[n].messages for n in range(4)] == [messages(n) for n in range(4)]
        assert source.fingerprint().startswith("files:") == (path == "disk")


def test_turns_stored_as_a_dict_of_lists_are_read_as_a_list_of_turns(tmp_path):
    columns = {
        key: [[turn[key] for turn in turns(n)] for n in range(2)] for key in ("role", "content")
    }
    rows = [{key: columns[key][n] for key in columns} for n in range(2)]
    pq.write_table(
        pa.table({"conversations": rows, "image": ["0.png", "1.png"]}), tmp_path / "a.parquet"
    )
    source = Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [source[n].messages for n in range(2)] == [messages(n) for n in range(2)]


def test_shards_are_one_source_and_are_mapped_into_memory(tmp_path):
    for shard in range(3):
        pq.write_table(
            table(range(4 * shard, 4 * shard + 4), image=["a.png"] * 4),
            tmp_path / f"t-{shard}.parquet",
        )
    source = Parquet(str(tmp_path / "t-{0..2}.parquet"), cache_dir=str(tmp_path / "cache"))
    assert [source[n].id.split(":")[1] for n in range(12)] == [f"n{n}" for n in range(12)]
    assert source[11].images == ["a.png"]
    assert source.records.table.cache_files


@pytest.mark.parametrize("name", ["b[1].parquet", "data [v2]/b1.parquet", "b*.parquet"])
def test_signs_of_a_pattern_in_a_path_are_part_of_it(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table(range(3), image=["a.png"] * 3), file)
    pq.write_table(table(range(7, 9), image=["a.png"] * 2), tmp_path / "b1.parquet")
    source = Parquet(str(file), cache_dir=str(tmp_path / "cache"))
    assert [source[n].id for n in range(len(source))] == [f"{file.stem}:n{n}" for n in range(3)]


def test_other_rows_of_the_same_path_and_time_are_read(tmp_path):
    file = tmp_path / "a.parquet"
    for first in (0, 5):
        pq.write_table(table(range(first, first + 3), image=["a.png"] * 3), file)
        os.utime(file, (1e9, 1e9))  # as rsync -t leaves it
        source = Parquet(str(file), cache_dir=str(tmp_path / "cache"))
        assert source[0].id == f"a:n{first}"


def test_questions_and_answers_are_chats_of_one_turn_pictures_first(tmp_path):
    rows = {
        "q": ["What is 0?", "<image>\nWhat is 1?"],
        "a": ["A 0.", "A 1."],
        "picture": ["0.png", "1.png"],
        "s": [None, "Be kind."],
    }
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    names = {
        "question_column": "q",
        "answer_column": "a",
        "image_column": "picture",
        "system_column": "s",
        "id_column": "picture",
    }
    source = Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"), **names)
    assert source[0].messages == messages(0)
    assert source[1].messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        *messages(1),
    ]
    assert [source[k].id for k in range(2)] == ["a:0.png", "a:1.png"]


def test_parts_with_missing_fields_as_arrow_stores_them_are_read(tmp_path):
    parts = [
        {"type": "image", "text": None, "index": 0},
        {"type": "text", "text": "\nWhat is 1?", "index": None},
    ]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A 1."}]},
    ]
    pq.write_table(pa.table({"messages": [chat], "images": [[png(1)]]}), tmp_path / "a.parquet")
    sample = Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))[0]
    assert (sample.images, sample.messages) == ([png(1)], messages(1))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            {"story": ["x"]},
            {},
            (
                "has no chat among its columns story; expected a chat in messages, .* told by "
                "messages_column, or"
            ),
        ),
        ({"messages": [turns(0)]}, {"image_column": "img"}, "has no column 'img'; it has messages"),
        (
            {"q": ["x"]},
            {"question_column": "q", "answer_column": "b"},
            "has no column 'b'; it has q",
        ),
        ({"messages": [3]}, {}, "sample a:0: 'messages' is a int, expected list .row 1 of a"),
        ({"messages": [turns(0)], "image": [5]}, {}, "sample a:0: 'image' is 5, expected a path"),
        (
            {"messages": [turns(0)], "image": ["http://x.org/a"]},
            {},
            "image http://x.org/a is a URL",
        ),
        (
            {"q": [None], "a": ["x"]},
            {"question_column": "q", "answer_column": "a"},
            "question is None, answer x, expected texts",
        ),
        ({"messages": pa.array([], pa.list_(pa.string()))}, {}, "holds no record"),
    ],
)
def test_a_wrong_column_is_named(tmp_path, suffix, rows, options, message):
    path = tmp_path / f"a.{suffix}"
    pq.write_table(pa.table(rows), path) if suffix == "parquet" else stream(path, pa.table(rows))
    with pytest.raises(DataError, match=message):
        Parquet(str(path), cache_dir=str(tmp_path / "cache"), **options)[0]


def test_files_that_are_no_tables_or_do_not_fit_together_are_named(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        for content in (b"", b"no table", b"ARROW1"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=f"{name} cannot be read as one table: "):
                len(Parquet(str(tmp_path / name), cache_dir=str(tmp_path / "cache")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        DataError, match="folder: expected a folder that Dataset.save_to_disk wrote"
    ):
        len(Parquet(str(tmp_path / "folder")))
    pq.write_table(table([0]), tmp_path / "b-0.parquet")
    pq.write_table(pa.table({"messages": [turns(1)]}), tmp_path / "b-1.parquet")
    with pytest.raises(DataError, match="b-1.parquet has no column 'id'; it has messages"):
        len(Parquet(str(tmp_path / "b-*.parquet"), cache_dir=str(tmp_path / "cache")))
    pq.write_table(pa.table({"id": [1], "messages": [3]}), tmp_path / "b-1.parquet")
    with pytest.raises(DataError, match="b-.*.parquet cannot be read as one table"):
        len(Parquet(str(tmp_path / "b-*.parquet"), cache_dir=str(tmp_path / "cache")))
    stream(tmp_path / "c-0.arrow", table([0]))
    stream(tmp_path / "c-1.arrow", pa.table({"id": [1], "messages": [3]}))
    with pytest.raises(DataError, match="c-.*.arrow cannot be read as one table"):
        len(Parquet(str(tmp_path / "c-*.arrow")))
    stream(tmp_path / "c-1.arrow", pa.table({"messages": [turns(1)]}))
    with pytest.raises(DataError, match="c-1.arrow has no column 'id'; it has messages"):
        len(Parquet(str(tmp_path / "c-*.arrow")))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("system", "b.*has the column system, which .*a.* does not have; expected the same"),
        ("images", "b.*has the column images, which .*a.* does not have; expected the same"),
        ("image_2", "b.*has the columns image_2 with pictures, videos or sound"),
        ("topic", None),
    ],
)
def test_a_column_that_only_a_later_file_has_is_refused_or_noted(tmp_path, suffix, column, message):
    write = pq.write_table if suffix == "parquet" else lambda rows, path: stream(path, rows)
    write(table([0], image=["a.png"]), tmp_path / f"a.{suffix}")
    write(table([1], image=["b.png"], **{column: ["x"]}), tmp_path / f"b.{suffix}")
    source = Parquet(str(tmp_path / f"*.{suffix}"), cache_dir=str(tmp_path / "cache"))
    if message:
        with pytest.raises(DataError, match=message):
            len(source)
    else:
        assert [note.text for note in source[0].notes] == ["the column 'topic'"]


def test_columns_of_one_name_are_refused(tmp_path):
    rows = table([0], q=["x"], r=["y"]).rename_columns(["id", "messages", "q", "q"])
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has 2 columns 'q', expected one of each name"):
        len(Parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache")))


def test_columns_that_contradict_each_other_are_refused():
    for wrong in (
        {"question_column": "q"},
        {"messages_column": "m", "question_column": "q", "answer_column": "a"},
    ):
        with pytest.raises(
            DataError,
            match="expected messages_column, or question_column and answer_column together",
        ):
            Parquet("a.parquet", **wrong)


LABELLED = datasets.Features(
    {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["cat", "dog"])}
)


@pytest.mark.parametrize("write", ["parquet", "arrow", "several"])
def test_a_class_is_read_by_its_name(tmp_path, write):
    rows = datasets.Dataset.from_dict({"question": ["?", "?"], "answer": [1, 0]}, LABELLED)
    path = tmp_path / "rows"
    if write == "arrow":
        rows.save_to_disk(str(path))
    else:
        for number in range(2 if write == "several" else 1):
            rows.to_parquet(str(tmp_path / f"{number}.parquet"))
        path = tmp_path / "*.parquet"
    source = Parquet(str(path), cache_dir=str(tmp_path / "cache"))
    answers = [source[n].messages[1]["content"][0]["text"] for n in range(2)]
    assert answers == ["dog", "cat"]


def test_classes_that_are_missing_or_differ_are_refused(tmp_path):
    rows = datasets.Dataset.from_dict({"question": ["?"], "answer": [-1]}, LABELLED)
    rows.to_parquet(str(tmp_path / "0.parquet"))
    with pytest.raises(DataError, match="answer is class -1, expected one of the 2 from 0"):
        Parquet(str(tmp_path / "0.parquet"), cache_dir=str(tmp_path / "cache"))[0]
    others = LABELLED.copy()
    others["answer"] = datasets.ClassLabel(names=["dog", "cat"])
    rows.cast(others).to_parquet(str(tmp_path / "1.parquet"))
    with pytest.raises(DataError, match="answer has other classes than in"):
        len(Parquet(str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache")))
