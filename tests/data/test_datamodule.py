"""Batches: the same for any number of ranks and workers, with blank images and skips as the
policies say."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.collate import Collator
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.alpaca import Alpaca
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.loading import GlobalBatchSampler
from owlfuse.data.notes import BatchRemarks
from owlfuse.model.vision.backbone import Preprocessing

PREPROCESS = Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, "bilinear")


def make(shapes, **options):
    sources = {
        "shapes": LLaVA(str(shapes / "train.json"), weight=0.5),
        "text": Alpaca(str(shapes / "text_train.json"), weight=0.5),
    }
    options = {"global_batch_size": 8, "workers": 0, **options}
    data = ChatData(
        str(shapes / "tokenizer"),
        options.pop("sources", sources),
        {"val": LLaVA(str(shapes / "val.json"))},
        **options,
    )
    data.bind(PREPROCESS, 2)
    return data


def batches(data, rank=0, ranks=1, first=0, steps=4):
    place = {"rank": rank, "num_replicas": ranks}
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs=place, max_steps=steps, global_step=first
    )
    return list(data.train_dataloader())


def test_a_source_whose_metrics_would_have_the_names_of_anothers_is_refused(shapes):
    source = LLaVA(str(shapes / "val.json"))
    validation = {"val": source, "val_blank": source}
    with pytest.raises(DataError, match="validation source val_blank: .* those of val with blank"):
        ChatData(str(shapes / "tokenizer"), {"shapes": source}, validation)


def test_text_only_and_multimodal_rows_share_a_batch_in_their_ratio(shapes):
    for batch in batches(make(shapes)):
        assert sorted(batch.sources) == ["shapes"] * 4 + ["text"] * 4
        assert batch.has_images
        assert batch.pixel_values.shape == (4, 3, 16, 16)
        assert batch.image_mask.all()
        assert (
            (batch.image_index >= 0).sum(1) == torch.tensor([s == "shapes" for s in batch.sources])
        ).all()


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, None), (2, 2), (4, 1)])
def test_the_global_batch_is_the_same_for_any_number_of_ranks_and_accumulation_steps(
    shapes, ranks, micro
):
    expected = [set(batch.ids) for batch in batches(make(shapes))]
    data = make(shapes, micro_batch_size=micro)
    parts = [batches(data, rank, ranks) for rank in range(ranks)]
    accumulation = data.accumulation(ranks)
    for step, ids in enumerate(expected):
        seen = [
            i
            for part in parts
            for b in part[step * accumulation : (step + 1) * accumulation]
            for i in b.ids
        ]
        assert len(seen) == len(ids)
        assert set(seen) == ids


def test_workers_do_not_change_the_batches(shapes):
    alone, with_workers = batches(make(shapes)), batches(make(shapes, workers=2))
    for one, other in zip(alone, with_workers, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.pixel_values, other.pixel_values)


def test_a_resumed_run_goes_on_with_the_batch_after_the_last(shapes):
    whole = batches(make(shapes))
    rest = batches(make(shapes), first=2)
    assert [batch.ids for batch in rest] == [batch.ids for batch in whole[2:]]


def test_the_sampler_says_the_length_of_the_whole_run():
    sampler = GlobalBatchSampler(8, 2, 0, 1, steps=10, first_step=7)
    assert len(sampler) == 20
    assert len(list(sampler)) == 6


def test_a_global_batch_that_does_not_divide_is_an_error(shapes):
    with pytest.raises(
        ValueError,
        match="global_batch_size is 8, which 3 ranks of micro_batch_size 2 do not divide",
    ):
        make(shapes, micro_batch_size=2).accumulation(3)


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("global_batch_size", 1),
        ("micro_batch_size", 1),
        ("max_length", 1),
        ("workers", 0),
        ("validation_samples", 0),
    ],
)
def test_a_number_that_cannot_be_is_an_error_before_anything_is_written(shapes, key, least):
    options = {key: least - 1, "prepare": pytest.fail}
    with pytest.raises(ValueError, match=f"^data.{key} is {least - 1}, expected at least {least}$"):
        make(shapes, **options)


def test_a_limit_of_pixels_is_at_most_what_pil_opens(shapes):
    limit = 2 * Image.MAX_IMAGE_PIXELS
    assert make(shapes, max_pixels=limit).max_pixels == limit
    for wrong in (0, limit + 1):
        message = f"^data.max_pixels is {wrong:,}, expected a number from 1 to {limit:,}"
        with pytest.raises(ConfigError, match=message):
            make(shapes, max_pixels=wrong)


def test_a_batch_without_images_has_one_blank_one_that_no_row_points_to(shapes):
    data = make(shapes)
    data.mixture.__init__({"shapes": 60, "text": 200}, {"shapes": 0, "text": 1})
    (batch,) = batches(data, steps=1)
    assert not batch.has_images
    assert batch.pixel_values.shape == (1, 3, 16, 16)
    assert not batch.image_mask.any()
    assert (batch.image_index == -1).all()
    assert not batch.placeholder.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_image_positions_with_the_text(shapes, side):
    data = make(shapes)
    source = data.sources["shapes"]
    rows = [data.load(source[i], source) for i in range(4)]
    batch = Collator(0, (3, 16, 16), side)(rows)
    for i, row in enumerate(rows):
        position = int(batch.image_positions[i, 0])
        assert batch.placeholder[i, position : position + 2].all()
        assert batch.placeholder[i].sum() == 2
        assert torch.equal(batch.input_ids[i][batch.attention_mask[i] == 1], row.input_ids)
        assert (batch.labels[i][batch.attention_mask[i] == 0] == -100).all()


@pytest.fixture
def broken(shapes, tmp_path):
    records = json.loads((shapes / "train.json").read_text())[:8]
    records[3]["image"] = "nowhere.png"
    (tmp_path / "broken.json").write_text(json.dumps(records))

    def source(on_error):
        return {
            "broken": LLaVA(
                str(tmp_path / "broken.json"), image_root=str(shapes), on_error=on_error
            )
        }

    return source


def test_a_wrong_sample_stops_by_default_and_is_named(shapes, broken):
    with pytest.raises(DataError, match="sample broken:train-000003: no image nowhere.png"):
        batches(make(shapes, sources=broken("error")))


def test_a_skipped_sample_is_counted_and_its_batch_is_one_shorter(shapes, broken):
    (batch,) = batches(make(shapes, sources=broken("skip")), steps=1)
    assert len(batch.ids) == 7
    ((source, sample, reason),) = batch.skipped
    assert (source, sample) == ("broken", "broken:3")
    assert "no image nowhere.png" in reason


def test_a_skip_of_validation_is_logged_once(shapes, broken, caplog):
    (batch,) = batches(make(shapes, sources=broken("skip")), steps=1)
    data = make(shapes)
    for _ in range(2):
        data.note_validation(BatchRemarks.of(batch))
    assert caplog.text.count("skipped broken:3 of validation source broken: ") == 1


def test_the_report_gives_hashes_shares_and_realised_counts(shapes):
    import hashlib

    data = make(shapes)
    report = data.report(steps=10, skipped=[("text", "text:5", "too long")])
    assert report["sources"]["shapes"]["drawn"] == 40
    assert report["sources"]["text"]["skipped"] == 1
    assert report["sources"]["text"]["share"] == 0.5
    digest = hashlib.sha256((shapes / "train.json").read_bytes()).hexdigest()
    assert report["sources"]["shapes"]["sha256"] == digest
    json.dumps(report)


def test_prompts_are_padded_on_the_left(shapes):
    data = make(shapes)
    source = data.validation["val"]
    from owlfuse.evaluation.questions import question_samples

    questions = [(q, source) for i in range(2) for q, _, _ in question_samples(source[i])]
    batch = data.prompts(questions)
    assert (batch.attention_mask[:, -1] == 1).all()
    assert batch.attention_mask.diff(dim=1).min() >= 0


def test_loaders_are_torch_dataloaders_over_every_validation_sample(shapes):
    loader = make(shapes).validation_loader("val", batch_size=5)
    assert isinstance(loader, DataLoader)
    assert [i for batch in loader for i in batch.ids] == [f"val:val-{i:06d}" for i in range(12)]
