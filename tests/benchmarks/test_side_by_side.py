"""The benchmarks side by side: what they compare, not how fast this machine is."""

import json

import pytest
import torch

from benchmarks import images, peak, step
from benchmarks.__main__ import main
from benchmarks.measure import slope
from owlfuse.model.loss import batch_loss, token_loss


def run(bench, out, *options):
    assert main([bench, "--size", "quick", "--repeats", "2", "--out", str(out), *options]) == 0
    return json.loads((out / f"{bench}.json").read_text()), (out / f"{bench}.md").read_text()


def test_step_tells_tokens_a_second_beside_the_peers(tmp_path):
    result, table = run("step", tmp_path)
    assert "| real tokens a second | padding | times as fast as the peer |" in table
    assert set(result["seconds"]) == set(result["times_as_fast"]) > {step.PEER, "owlfuse"}
    quotients = [a / b for a, b in zip(result["seconds"][step.PEER], result["seconds"]["owlfuse"])]
    assert result["times_as_fast"]["owlfuse"]["median"] == pytest.approx(sum(quotients) / 2)
    assert result["positions"]["packed"] < result["positions"]["padded"]
    assert set(result["versions"]) == {"torch", "transformers", "lightning", "timm"}


def test_the_peer_has_the_sizes_and_on_the_same_weights_the_loss_of_ours():
    sizes, data = step.SIZES["quick"]
    ours, theirs = step.owlfuse_model(sizes).eval(), step.peer_model(sizes).eval()
    for name, part in (
        ("language_model", ours.llm.model),
        ("multi_modal_projector", ours.connector),
    ):
        assert count(getattr(theirs.model, name)) == count(part)
    blocks = zip(theirs.model.vision_tower.encoder.layers, ours.vision.body.blocks, strict=True)
    assert all(count(one) == count(other) for one, other in blocks)
    theirs.model.language_model.load_state_dict(ours.llm.model.state_dict())
    theirs.lm_head.load_state_dict(ours.llm.lm_head.state_dict())
    text = [
        sample
        for sample in step.make_samples(data, sizes, sizes.visual_tokens)
        if not sample.pixel_values
    ]
    padded, packed = (step.make_batch(text, sizes, pack_to) for pack_to in (None, 320))
    with torch.no_grad():
        expected = theirs(
            input_ids=padded.input_ids, attention_mask=padded.attention_mask, labels=padded.labels
        ).loss
        for loss, tokens in (
            batch_loss(ours, padded),
            batch_loss(ours, packed),
            token_loss(ours(packed), packed.labels),
        ):
            torch.testing.assert_close(loss / tokens, expected, rtol=1e-5, atol=1e-5)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.slow
def test_images_tells_time_and_memory_of_three_fusions_with_slopes(tmp_path, monkeypatch):
    grows = {
        what: {fusion: {1: 5.0, 3: 9.0} for fusion in images.FUSIONS}
        for what in ("step", "prefill")
    }
    monkeypatch.setattr(images, "peaks_of", lambda counts, llm, precision: grows)
    check_images(tmp_path)


@pytest.mark.slow
def test_images_measures_each_peak_in_a_process_of_its_own(tmp_path):
    check_images(tmp_path)


def check_images(tmp_path):
    result, table = run("images", tmp_path, "--images", "1,3")
    assert (tmp_path / "images.png").stat().st_size > 1000
    assert table.count("| fusion | 1 | 3 |") == 4
    for what in ("step", "prefill"):
        for fusion in images.FUSIONS:
            assert len(result["milliseconds"][what][fusion]["3"]) == 2
            few, many = (result["MiB"][what][fusion][n] for n in ("1", "3"))
            assert result["slopes"][f"{what}, MiB"][fusion] == pytest.approx((many - few) / 2)
    assert result["concat_over_it"]["step, ms, concat"]["median"] == 1


def test_a_slope_is_that_of_the_least_squares_line():
    assert slope({1: 3.0, 2: 5.0, 4: 9.0}) == pytest.approx(2)


def test_modality_adaptive_tells_what_the_copies_add(tmp_path):
    result, table = run("modality_adaptive", tmp_path)
    assert "| ms a step | over concat, % |" in table
    assert len(result["steps"]) == 2
    for found in result["steps"].values():
        assert set(found["over_concat"]) == {
            "concat",
            "modality_adaptive",
            "modality_adaptive, both copies everywhere",
        }


@pytest.mark.slow
def test_peak_tells_the_floor_and_where_the_time_goes(tmp_path):
    result, table = run("peak", tmp_path)
    assert "by kind of operation" in table
    assert set(result["stage_seconds"]) == set(step.STAGES)
    seconds = sorted(result["seconds"]["step"])[1]
    operations = sum(result["operations"].values())
    assert operations / seconds / result["matrix_flops_per_second"] == pytest.approx(
        result["share_of_matrix_rate"], rel=1
    )
    assert result["profile_seconds"]["matrix products"] > 0
    assert result["profile_seconds"]["attention"] > 0


def test_operations_are_sorted_by_what_they_do():
    names = {
        "aten::mm": "matrix products",
        "aten::addmm": "matrix products",
        "aten::mul": peak.REMAINDER,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attention",
        "aten::index_copy": "gathering and scattering",
        "aten::_fused_adamw_": "optimizer",
        "aten::_log_softmax": "loss",
    }
    assert {name: peak.operation_kind(name) for name in names} == names
