"""`owlfuse train -m`: what is refused before the first run trains."""

import pytest

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
