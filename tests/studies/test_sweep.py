"""`owlfuse train -m`: what is refused before the first run trains."""

import pytest

from owlfuse.core.environment import RANK_VARIABLES
from owlfuse.core.errors import ConfigError
from owlfuse.studies.sweep import sweep


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["name=a", "seed=0,1"], "name=a seed=1 .*: name: an earlier run .* has the folder .*/a"),
        (["name=b,there"], "name=there .*: name: the run .*/there exists; choose another name="),
    ],
)
def test_a_name_that_is_taken_is_told_before_the_first_run_trains(
    words, message, tmp_path, monkeypatch
):
    there = tmp_path / "shapes_owl1" / "there"
    there.mkdir(parents=True)
    for name in ("config.yaml", "results.json"):
        (there / name).write_text("{}")
    monkeypatch.setattr("owlfuse.training.train.run", lambda _: pytest.fail("a run is trained"))
    with pytest.raises(ConfigError, match=message):
        sweep(["experiment=shapes_owl1", *words, f"runs={tmp_path}"])


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, 1), ({"SLURM_PROCID": "0"}, 1), ({"SLURM_PROCID": "1"}, 0), ({"RANK": "1"}, 0)],
)
@pytest.mark.fast_cases(2)
def test_one_rank_prints_the_table(variables, count, tmp_path, monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    printed = []
    monkeypatch.setattr("owlfuse.studies.sweep.check_runs", lambda *given: None)
    monkeypatch.setattr("owlfuse.studies.sweep.starts_processes", lambda config: False)
    monkeypatch.setattr("owlfuse.studies.sweep.print_table", lambda *given: printed.append(given))
    monkeypatch.setattr("owlfuse.training.train.run", lambda config: tmp_path)
    sweep(["experiment=shapes_owl1", "seed=0,1", f"runs={tmp_path}"])
    assert len(printed) == count
