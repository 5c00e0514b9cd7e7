"""mixture.json tells of ids that several samples bear, of what is left of a pass, and of
validation sources."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.messages import Messages
from owlfuse.data.formats.parquet import Parquet
from owlfuse.data.formats.webdataset import WebDataset
from owlfuse.data.mixture.mixture import Mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.data.mixture.report import duplicate_ids, mixture_report
from single_draws import look_up

IDS = ["a", "b", None, "a", "c", "b", "a", 2, "d"]
"""`2` is what the record without an id is called by its place."""
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w"}]


def mixture_of(source, seed=0, **options):
    source.name = "it"
    return Mixture({"it": len(source)}, {"it": 1.0}, seed, **options)


def write_jsonl(path, ids, record):
    path.write_text(
        "\n".join(json.dumps(record | ({} if i is None else {"id": i})) for i in ids) + "\n"
    )
    return str(path)


def messages(tmp_path):
    return Messages(write_jsonl(tmp_path / "m.jsonl", IDS, {"messages": CHAT}))


def broken_lines(tmp_path):
    file = write_jsonl(tmp_path / "m.jsonl", IDS[:3], {"messages": CHAT})
    with open(file, "a") as out:
        out.write("{broken\n[1]\n")
    write_jsonl(tmp_path / "n.jsonl", IDS[3:], {"messages": CHAT})
    with open(file, "a") as out:
        out.write((tmp_path / "n.jsonl").read_text())
    return Messages(file)


def captions(tmp_path):
    rows = "\n".join(f"{'' if i is None else i},x.png,words" for i in IDS if i not in (None, 2))
    (tmp_path / "c.csv").write_text(f"id,image,caption\n{rows}\n")
    return Captions(str(tmp_path / "c.csv"))


def parquet(tmp_path):
    ids = [None if i is None else str(i) for i in IDS]
    pq.write_table(pa.table({"id": ids, "messages": [CHAT] * len(ids)}), tmp_path / "p.parquet")
    return Parquet(str(tmp_path / "p.parquet"), cache_dir=str(tmp_path / "cache"))


def tar(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as out:
        for name in [str(i) for i in IDS if i not in (None, 2)]:
            for suffix in ("json", "cls"):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = 2
                out.addfile(entry, io.BytesIO(b"{}"))
    return WebDataset(str(tmp_path / "t.tar"))


@pytest.mark.parametrize(
    ("make", "count", "first"),
    [
        (messages, 4, {"id": "a", "samples": [0, 3]}),
        (broken_lines, 4, {"id": "a", "samples": [0, 5]}),
        (captions, 3, {"id": "a", "samples": [0, 2]}),
        (parquet, 4, {"id": "a", "samples": [0, 3]}),
        (tar, 3, {"id": "a", "samples": [0, 2]}),
    ],
)
def test_ids_that_several_samples_bear_are_counted_and_the_first_is_named(
    tmp_path, make, count, first
):
    source = make(tmp_path)
    mixture = mixture_of(source)
    for drawn in (len(source), 3 * len(source) + 1):
        assert duplicate_ids(mixture, source, drawn) == {
            "count": count,
            "looked_at": len(source),
            "first": first,
        }


def test_a_chat_of_several_records_is_looked_at_record_by_record(tmp_path):
    source = Alpaca(
        write_jsonl(tmp_path / "a.jsonl", IDS, {"instruction": "q", "output": "w"}),
        records_per_chat=2,
    )
    found = duplicate_ids(mixture_of(source), source, 5)
    assert found == {"count": 4, "looked_at": 5, "first": {"id": "a", "samples": [0, 1]}}
    same = Alpaca(
        write_jsonl(tmp_path / "b.jsonl", ["x", "x"], {"instruction": "q", "output": "w"}),
        records_per_chat=2,
    )
    assert duplicate_ids(mixture_of(same), same, 1)["first"] == {"id": "x", "samples": [0, 0]}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    drawn=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_what_was_not_drawn_is_not_compared(tmp_path_factory, ids, drawn, seed):
    source = Messages(
        write_jsonl(tmp_path_factory.mktemp("ids") / "m.jsonl", ids, {"messages": CHAT})
    )
    mixture = mixture_of(source, seed)
    seen = sorted({look_up(mixture, position)[1] for position in range(drawn)})
    again = [
        index for index in seen if ids[index] in [ids[other] for other in seen if other < index]
    ]
    found = duplicate_ids(mixture, source, drawn)
    assert (found["count"], found["looked_at"]) == (len(again), len(seen))
    if again:
        first = next(other for other in seen if ids[other] == ids[again[0]])
        one, other = found["first"]["samples"]
        assert (one, other, found["first"]["id"]) == (first, again[0], str(ids[first]))


def test_what_is_left_of_the_last_pass_is_what_was_not_drawn_in_it(tmp_path):
    sources = {}
    for name, size in (("a", 10), ("b", 25), ("c", 4)):
        file = write_jsonl(tmp_path / f"{name}.jsonl", range(size), {"messages": CHAT})
        sources[name] = Messages(file, weight={"a": 1, "b": 1, "c": 0}[name])
        sources[name].name = name
    mixture = Mixture(
        {n: len(s) for n, s in sources.items()},
        {n: s.weight for n, s in sources.items()},
        at_end={"b": "stop"},
    )
    for steps in (0, 1, 3, 12, 100):
        report = mixture_report(mixture, sources, StepPositions.of(4), steps, [])
        drawn = [look_up(mixture, position) for position in range(mixture.available(4 * steps))]
        for name, row in report["sources"].items():
            mine = [index for source, index in drawn if source == name]
            under_way = (
                mine[(len(mine) - 1) // len(sources[name]) * len(sources[name]) :] if mine else []
            )
            assert row["left_of_last_pass"] == len(sources[name]) - len(under_way)
