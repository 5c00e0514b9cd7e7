"""Counts of tokens: what the encoder gives, kept beside the data under a key that changes with
all that they depend on."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from owlfuse.core.errors import DataError
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.captions import Captions
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media.pictures import Pictures
from owlfuse.data.mixture import lengths as module
from owlfuse.data.mixture.lengths import CACHE_FOLDER, cache_path, count_lengths
from owlfuse.data.mixture.mixture import make_mixture
from owlfuse.data.mixture.positions import StepPositions
from owlfuse.model.vision.backbone import Preprocessing
from single_draws import look_up

PICTURES = Pictures(Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear"))


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
        data.bind(PICTURES.preprocess, 2)
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
    monkeypatch.setattr(module, "SMALL_SOURCE", 0)
    monkeypatch.setattr(module, "CHUNK", 7)
    encoder = data().encoder
    found = count_lengths(source, encoder, PICTURES, workers)
    assert list(zip(found.tokens.tolist(), found.supervised.tolist())) == list(
        by_hand(source, encoder)
    )
    assert set(found.wrong) == {3}
    assert "has no 'output'" in found.wrong[3]


def test_they_are_counted_once_and_again_when_what_they_depend_on_changes(
    data, source, monkeypatch
):
    counted = []
    count = module.encode_all
    monkeypatch.setattr(module, "encode_all", lambda *args: counted.append(1) or count(*args))
    encoder = data().encoder
    first = count_lengths(source, encoder, PICTURES)
    again = count_lengths(Alpaca(str(source.file), weight=3, on_error="error"), encoder, PICTURES)
    assert counted == [1]
    assert np.array_equal(first.supervised, again.supervised)
    assert first.wrong == again.wrong
    count_lengths(Alpaca(str(source.file), records_per_chat=2), encoder, PICTURES)
    count_lengths(source, data(max_length=99).encoder, PICTURES)
    other = load_tokenizer(encoder.tokenizer.name_or_path)
    other.chat_template = encoder.tokenizer.chat_template + "{# other #}"
    count_lengths(source, type(encoder)(other, 2, 2048), PICTURES)
    source.file.write_text(source.file.read_text() + "\n")
    count_lengths(source, encoder, PICTURES)
    assert len(counted) == 5


def test_they_are_counted_again_once_a_missing_picture_has_come(data, tmp_path):
    record = {
        "id": "a",
        "image": "wide.png",
        "conversations": [
            {"from": "human", "value": "<image>\n?"},
            {"from": "gpt", "value": "Wide."},
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps([record]))
    encoder = data().encoder
    counts = []
    for size in (None, (400, 100), (200, 100)):
        if size:
            Image.new("RGB", size).save(tmp_path / "wide.png")
        source = LLaVA(str(tmp_path / "a.json"), tile=1.0)
        counts.append(int(count_lengths(source, encoder, PICTURES).tokens[0]))
    # one view, then a row of four tiles, then one of two
    assert counts[0] < min(counts[1:])
    assert len(set(counts)) == 3


def test_of_those_that_begin_at_once_one_counts(data, source, monkeypatch):
    """As ranks of torchrun do; a thread that opens the folder by itself is held as a process is."""
    counted = []
    count = module.encode_all

    def count_slowly(*args):
        counted.append(1)
        time.sleep(0.2)
        return count(*args)

    monkeypatch.setattr(module, "encode_all", count_slowly)
    encoder = data().encoder
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: count_lengths(source, encoder, PICTURES), range(2))
    assert counted == [1]
    assert np.array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda content: b"PK broken",
        lambda content: content[: len(content) // 2],
        # the bytes of the first array, compressed
        lambda content: content[:60] + bytes(40) + content[100:],
    ],
)
def test_a_file_of_counts_that_is_broken_is_counted_anew(data, source, damaged):
    encoder = data().encoder
    first = count_lengths(source, encoder, PICTURES)
    (kept,) = (source.file.parent / CACHE_FOLDER).iterdir()
    kept.write_bytes(damaged(kept.read_bytes()))
    assert np.array_equal(count_lengths(source, encoder, PICTURES).tokens, first.tokens)


def test_a_folder_that_cannot_be_written_is_no_error(data, source, capsys):
    (source.file.parent / CACHE_FOLDER).write_text("a file in the folder's place")
    assert count_lengths(source, data().encoder, PICTURES).tokens.sum() > 0
    assert "the token counts cannot be kept" in capsys.readouterr().err


def test_weights_by_tokens_are_divided_by_the_mean_supervised_length(data):
    data = data(weights_by="tokens", weights_at={10: {"text": 3}})
    supervised = {}
    for name, source in data.sources.items():
        supervised[name] = [tokens for _, tokens in by_hand(source, data.encoder)]
    # A wrong sample is drawn and left out: it counts as one without tokens.
    means = {name: Fraction(sum(counts), len(counts)) for name, counts in supervised.items()}
    for (_, shares), weight in zip(data.mixture.sample_phases, (1, 3), strict=True):
        text, shapes = weight / means["text"], 1 / means["shapes"]
        assert float(shares["text"]) == pytest.approx(text / (text + shapes), abs=2**-19)
    sums = dict.fromkeys(supervised, 0)
    sources, indices = data.mixture.positions(80, 8080)
    for source, index in zip(sources, indices, strict=True):
        name = data.mixture.names[source]
        sums[name] += supervised[name][index]
    assert sums["text"] / sum(sums.values()) == pytest.approx(3 / 4, abs=0.005)


def test_realised_shares_of_tokens_are_reported_of_the_very_samples(data):
    data = data(weights_by="tokens")
    steps = 37
    report = data.report(steps, [])
    tokens = dict.fromkeys(data.sources, 0)
    counts = data.lengths()
    for position in range(8 * steps):
        name, index = look_up(data.mixture, position)
        tokens[name] += int(counts[name].supervised[index])
    for name, row in report["sources"].items():
        assert row["supervised_tokens"] == tokens[name]
        assert row["supervised_share"] == pytest.approx(tokens[name] / sum(tokens.values()))
        assert row["asked_share"] == row["share"] == 0.5
        assert row["mean_supervised"] == pytest.approx(counts[name].supervised.mean())
    assert report["phases"][0]["shares"] == {"text": 0.5, "shapes": 0.5}
    drawn = report["phases"][0]["sample_shares"]
    assert drawn["text"] * counts["text"].supervised.mean() == pytest.approx(
        drawn["shapes"] * counts["shapes"].supervised.mean(), rel=1e-4
    )


def test_shares_of_tokens_that_were_not_counted_are_none(data):
    report = data().report(3, [])
    assert [row["supervised_share"] for row in report["sources"].values()] == [None, None]
    assert [row["supervised_tokens"] for row in report["sources"].values()] == [None, None]


def of_lengths(*tokens, samples=40):
    return module.Lengths(*(np.full(samples, count) for count in tokens), {})


@pytest.mark.parametrize(
    ("temperature", "tokens", "share_by_tokens", "share_by_samples"),
    [(1.0, (9, 1), 0.9, 0.5), (2.0, (9, 1), 0.75, 0.25), (2.0, (7, 7), 0.5, 0.5)],
)
def test_a_temperature_weighs_by_supervised_tokens_where_the_shares_are_of_tokens(
    source, temperature, tokens, share_by_tokens, share_by_samples
):
    sources = {"a": source, "b": Alpaca(str(source.file))}
    lengths = {name: of_lengths(count, count) for name, count in zip("ab", tokens, strict=True)}
    options = {"temperature": temperature, "weights_at": {5: {"b": 1.0}}}
    mixture = make_mixture(sources, 0, StepPositions.of(8), lengths=lengths, **options)
    for (_, shares), (_, sample_shares) in zip(mixture.phases, mixture.sample_phases, strict=True):
        assert float(shares["a"]) == pytest.approx(share_by_tokens)
        assert float(sample_shares["a"]) == pytest.approx(share_by_samples)
    by_samples = make_mixture(sources, 0, StepPositions.of(8), **options)
    assert [float(share) for share in by_samples.phases[0][1].values()] == [0.5, 0.5]


@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
def test_a_source_without_supervised_tokens_is_named(source, temperature):
    sources = {"a": source, "b": Alpaca(str(source.file))}
    lengths = {"a": of_lengths(9, 9), "b": of_lengths(9, 0)}
    with pytest.raises(ValueError, match="source b has weight 1.0 and no supervised token"):
        make_mixture(sources, 0, StepPositions.of(8), temperature=temperature, lengths=lengths)


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
            {"temperature": 2.0, "weights_at": {1: {"txt": 1}}},
            "weights_at 1 names txt, which is no source; they are text, shapes",
        ),
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
    assert cache_path(plain, tokenizer, PICTURES) != cache_path(other, tokenizer, PICTURES)
    len(plain), plain[0]
    assert cache_path(plain, tokenizer, PICTURES) == cache_path(
        Captions(str(file)), tokenizer, PICTURES
    )
