"""Loggers of tracking services: one run there for a run here, under its name, also after a
resume."""

from pathlib import Path

import pytest

from helpers import SHORT_ANSWERS, SMALL_RUN
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.training import train
from owlfuse.training.loggers import make_loggers, read_ids

SMALL = [
    "experiment=shapes_owl1",
    *SMALL_RUN,
    *SHORT_ANSWERS,
    "data.validation_samples=2",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def loggers_of(folder, *overrides):
    return make_loggers(compose(["experiment=shapes_owl1", *overrides]), folder, None)


def test_a_logger_of_files_writes_into_the_runs_folder_alone(folder):
    (logger,) = loggers_of(folder, "logger.tensorboard=null")
    assert Path(logger.log_dir).resolve() == folder
    with pytest.raises(ConfigError, match=r"logger.csv.name: CSVLogger writes into the run's"):
        loggers_of(folder, "+logger.csv.name=mine")


@pytest.mark.parametrize(
    "override",
    [
        "+logger.mlflow.tracking_uri=http://example.org",
        "+logger.mlflow={_target_: lightning.pytorch.loggers.WandbLogger, settings: {base_url: x}}",
    ],
)
def test_a_run_names_no_address_of_a_service(override, folder):
    """A stranger's run that is gone on with would send what it learns there."""
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI or WANDB_BASE_URL") as error:
        loggers_of(folder, "logger=mlflow", override)
    assert "\n" not in str(error.value)


def test_a_service_whose_package_is_missing_is_one_line(folder, monkeypatch):
    # Lightning asks for the package when the logger is made
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"logger.mlflow: MLFlowLogger needs a package") as error:
        loggers_of(folder, "logger=mlflow")
    assert "\n" not in str(error.value)


def test_names_at_a_service_are_those_of_the_experiment_and_the_run_unless_they_are_given(folder):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run_folder = folder / "runs" / "shapes_owl1" / "trial"
    run_folder.mkdir(parents=True)
    _, logger = loggers_of(run_folder, "logger=wandb")
    tracked = logger.experiment
    assert (tracked.project, tracked.name) == ("shapes_owl1", "trial")
    tracked.finish()
    _, logger = loggers_of(run_folder, "logger=wandb", "+logger.wandb.project=mine")
    assert logger.experiment.project == "mine"
    logger.experiment.finish()


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_run_of_wandb_with_its_configuration_and_results(folder):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run_folder = train.run(compose([*SMALL, "logger=wandb", "name=w", "trainer.max_steps=2"]))
    assert wandb.run is None, "the next run of this process would log into this one"
    (run_id,) = read_ids(run_folder).values()
    resumed = compose([f"resume={run_folder}", "trainer.max_steps=3"])
    train.run(resumed)
    assert read_ids(run_folder) == {"wandb": run_id}
    parts = list((run_folder / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(parts) == 2, "one part for each start, of one run"


@pytest.mark.slow
def test_a_run_that_goes_on_is_one_run_of_mlflow_with_its_configuration_and_results(folder):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    run_folder = train.run(compose([*SMALL, "logger=mlflow", "name=m", "trainer.max_steps=2"]))
    train.run(compose([f"resume={run_folder}", "trainer.max_steps=3"]))
    client = mlflow.MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("shapes_owl1")
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name == "m"
    assert tracked.data.params["model/fusion/_target_"].endswith("Concat")
    assert "val/exact_match" in tracked.data.metrics
    steps = [row.step for row in client.get_metric_history(tracked.info.run_id, "train/loss")]
    assert steps == [0, 1, 2]
    assert not Path("mlruns").exists(), "nothing is left in the working folder"


def test_ids_that_cannot_be_read_are_told_in_a_line(tmp_path):
    (tmp_path / "logger_ids.json").write_text("{")
    with pytest.raises(DataError, match="logger_ids.json"):
        read_ids(tmp_path)
