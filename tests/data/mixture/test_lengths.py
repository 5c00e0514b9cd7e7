"""Counts of tokens: what the encoder gives, kept beside the data under a key that changes with
all that they depend on."""

import json

import numpy as np
import pytest

from owlfuse.core.errors import DataError
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.mixture import lengths as module
from owlfuse.data.mixture.lengths import FOLDER, count_lengths, kept_path
from owlfuse.data.mixture.mixture import make_mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.model.vision.backbone import Preprocessing


@pytest.fixture
def records():
    return [
        {"instruction": f"say {'so ' * (i % 7)}", "output": "yes " * (1 + i % 5)} for i in range(40)
    ]


@pytest.fixture
def source(tmp_path, records):
    records[3] = {"instruction": "no output"}
    (tmp_path / "text.json").write_text(json.dumps(records))
    return Alpaca(str(tmp_path / "text.json"), on_error="skip")


@pytest.fixture
def data(shapes, source):
    def make(**options):
        sources = options.pop(
            "sources", {"text": source, "shapes": LLaVA(str(shapes / "train.json"))}
        )
        data = ChatData(
            str(shapes / "tokenizer"), sources, {}, global_batch_size=8, workers=0, **options
        )
        data.bind(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"), 2)
        return data

    return make


def by_hand(source, encoder):
    """Tokens and supervised tokens, 0 for a wrong sample."""
    for index in range(len(source)):
        try:
            encoded = encoder.encode(source[index])
        except DataError:
            yield 0, 0
        else:
            yield len(encoded.input_ids), int((encoded.labels != -100).sum())


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_are_the_encoders_whatever_the_processes(data, source, workers, monkeypatch):
    monkeypatch.setattr(module, "FEW", 0)
    monkeypatch.setattr(module, "CHUNK", 7)
    encoder = data().encoder
    found = count_lengths(source, encoder, workers)
    assert list(zip(found.tokens.tolist(), found.supervised.tolist())) == list(
        by_hand(source, encoder)
    )
    assert set(found.wrong) == {3}
    assert "has no 'output'" in found.wrong[3]


def test_they_are_counted_once_and_again_when_what_they_depend_on_changes(
    data, source, monkeypatch
):
    counted = []
    count = module.count
    monkeypatch.setattr(module, "count", lambda *args: counted.append(1) or count(*args))
    encoder = data().encoder
    first = count_lengths(source, encoder)
    again = count_lengths(Alpaca(str(source.file), weight=3, on_error="error"), encoder)
    assert counted == [1]
    assert np.array_equal(first.supervised, again.supervised)
    assert first.wrong == again.wrong
    count_lengths(Alpaca(str(source.file), records_per_chat=2), encoder)
    count_lengths(source, data(max_length=99).encoder)
    other = load_tokenizer(encoder.tokenizer.name_or_path)
    other.chat_template = encoder.tokenizer.chat_template + "{# other #}"
    count_lengths(source, type(encoder)(other, 2, 2048))
    source.file.write_text(source.file.read_text() + "\n")
    count_lengths(source, encoder)
    assert len(counted) == 5


def test_a_file_of_counts_that_is_broken_is_counted_anew(data, source):
    encoder = data().encoder
    first = count_lengths(source, encoder)
    (kept,) = (source.file.parent / FOLDER).iterdir()
    kept.write_bytes(b"PK broken")
    assert np.array_equal(count_lengths(source, encoder).tokens, first.tokens)


def test_a_folder_that_cannot_be_written_is_no_error(data, source, capsys):
    (source.file.parent / FOLDER).write_text("a file in the folder's place")
    assert count_lengths(source, data().encoder).tokens.sum() > 0
    assert "the token counts cannot be kept" in capsys.readouterr().err


def test_weights_by_tokens_share_out_supervised_tokens(data):
    data = data(weights_by="tokens", weights_at={10: {"text": 3}})
    counts = {
        name: count_lengths(source, data.encoder).supervised
        for name, source in data.sources.items()
    }
    longest = max(int(found.max()) for found in counts.values())
    for start, stop, share in ((0, 80, 1 / 2), (80, 400, 3 / 4)):
        sums = dict.fromkeys(counts, 0)
        for position in range(start, stop):
            name, index = data.mixture[position]
            sums[name] += int(counts[name][index])
            assert abs(sums["text"] - share * sum(sums.values())) <= longest


def test_a_temperature_weighs_by_supervised_tokens_where_the_shares_are_of_tokens(source):
    other = Alpaca(str(source.file))
    one = module.Lengths(np.full(40, 9), np.full(40, 9), {})
    two = module.Lengths(np.full(40, 1), np.full(40, 1), {})
    sources, lengths = {"a": source, "b": other}, {"a": one, "b": two}
    assert [
        float(s)
        for s in make_mixture(
            sources, 0, StepPositions.of(8), temperature=1.0, lengths=lengths
        ).shares
    ] == [
        0.9,
        0.1,
    ]
    assert [
        float(s)
        for s in make_mixture(
            sources, 0, StepPositions.of(8), temperature=2.0, lengths=lengths
        ).shares
    ] == pytest.approx([0.75, 0.25])
    assert [
        float(s) for s in make_mixture(sources, 0, StepPositions.of(8), temperature=2.0).shares
    ] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights_by": "rows"}, "weights_by is rows, expected samples or tokens"),
        (
            {"weights_at": {"soon": {"text": 1}}},
            "weights_at: soon: expected an optimizer step from 0 on",
        ),
        ({"temperature": -1.0}, "temperature is -1.0, expected a number above 0"),
        (
            {"at_end": {"pictures": "once"}},
            "at_end names pictures, which is no source; they are text, shapes",
        ),
    ],
)
def test_wrong_keys_are_named(data, options, message):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_a_schedule_shorter_than_a_global_batch_is_refused(data, tmp_path, records):
    (tmp_path / "short.json").write_text(json.dumps(records[:3]))
    short = data(sources={"text": Alpaca(str(tmp_path / "short.json"))}, at_end="once")
    with pytest.raises(DataError, match="the schedule has 3 samples and then ends"):
        short.steps(10)


@pytest.mark.parametrize(
    "options",
    [
        {"caption_field": "text"},
        {"instructions": ["Say what it is."]},
        {"instructions": ["Say what it is.", "Describe it."]},
    ],
    ids=str,
)
def test_counts_are_kept_apart_for_sources_that_make_other_chats_of_one_file(
    options, tmp_path, shapes
):
    file = tmp_path / "captions.json"
    file.write_text('[{"image": "a.png", "caption": "A dog.", "text": "A very large dog."}]')
    tokenizer = ChatEncoder(load_tokenizer(str(shapes / "tokenizer")), tokens_per_image=1)
    plain, other = Captions(str(file)), Captions(str(file), **options)
    assert kept_path(plain, tokenizer) != kept_path(other, tokenizer)
    len(plain), plain[0]
    assert kept_path(plain, tokenizer) == kept_path(Captions(str(file)), tokenizer)
