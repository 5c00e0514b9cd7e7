"""The training benchmark: what it measures, not how fast this machine is."""

import json

import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize("options", [[], ["--checkpointing"]], ids=["plain", "checkpointing"])
@pytest.mark.slow
def test_it_leaves_a_table_a_plot_and_numbers_and_the_plan_is_right(tmp_path, capsys, options):
    command = [
        "train",
        "--size",
        "tiny",
        "--rows",
        "1",
        "--length",
        "96",
        "--steps",
        "1",
        "--precision",
        "bf16-mixed",
    ]
    assert main([*command, "--out", str(tmp_path), *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "train.json").read_text())
    assert (tmp_path / "train.png").stat().st_size > 1000
    assert "peak memory, GB" in printed
    assert "tokens a second" in printed
    assert result["peak_GB"]["planned"] == pytest.approx(result["peak_GB"]["measured"], rel=0.02)
    assert result["tokens_per_second"] == pytest.approx(96 / result["seconds_per_step"])
    rate = result["flops_per_step"] / result["seconds_per_step"] / (result["matmul_tflops"] * 1e12)
    assert result["share_of_matmul_rate"] == pytest.approx(rate)
    assert rate > 0


def test_a_wrong_size_is_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "--size", "7b"])
    assert error.value.code == 2
    assert "invalid choice: '7b'" in capsys.readouterr().err
