"""The data benchmark: that it measures what it says, not how fast this machine is."""

import json

import pytest

from benchmarks import data


@pytest.mark.slow
def test_it_leaves_tables_and_numbers_of_every_tool(tmp_path, capsys):
    result = data.bench_data(tmp_path, samples=5000, repeats=1, rows={"chats": 200, "text": 100})
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "data.json").read_text()) == result
    assert set(result["positions_per_second"]) == {
        "owlfuse",
        "datasets.interleave_datasets",
        "torch WeightedRandomSampler",
    }
    assert set(result["seconds_to_first_batch"]) == {"0 workers", "1 workers", "2 workers"}
    paces = (
        "positions_per_second",
        "micro_batch_positions_per_second",
        "pictures_per_second_and_worker",
    )
    for tool, value in (pair for key in paces for pair in result[key].items()):
        assert tool.split()[0] in printed
        assert value > 0


def test_every_tool_draws_from_the_same_files_as_many_as_it_is_counted_for(tmp_path):
    sources = data.write_files(tmp_path, {"chats": 60, "text": 30})
    drawers = data.drawers(tmp_path, sources, 500)
    assert drawers["owlfuse"]() == drawers["torch WeightedRandomSampler"]() == 500
    assert 30 < drawers["datasets.interleave_datasets"]() <= 200
    # whole micro batches
    assert [batcher() for batcher in data.batchers(sources, 500).values()] == [480, 480]
