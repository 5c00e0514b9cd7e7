"""The loggers of a run: files in its folder, and runs of tracking services under its name."""

from __future__ import annotations

import csv
import inspect
import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.utils import get_class
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from owlfuse.artifacts.resume import Past
from owlfuse.config.build import build
from owlfuse.config.compose import origin_of
from owlfuse.core.errors import ConfigError, first_line
from owlfuse.core.files import read_json, write_json

# Loggers that write their files straight into the run's folder.
FOLDER_LOGGERS = (CSVLogger, TensorBoardLogger)
# The ids by which the services know a run, so that a run that goes on stays one run there.
IDS_FILE = "logger_ids.json"
# Arguments that name a service's address.
ADDRESS_KEYS = ("tracking_uri", "artifact_location", "settings")


def make_loggers(config: DictConfig, folder: Path, past: Past | None) -> list[Any]:
    """Returns the loggers of a configuration, in its order.

    Args:
        past: what the run goes on from; metrics logged after it are dropped, since they come again.

    Raises:
        ConfigError: a logger whose package is missing, that has a folder of its own, or that names
            the address of a service.
    """
    loggers = []
    for key, node in (config.logger or {}).items():
        if node:
            loggers.append(make_logger(str(key), node, config, folder, past))
    rows = logged_rows(past) if past else []
    for logger in loggers:
        if isinstance(logger, CSVLogger) and rows:  # Lightning would begin the file anew
            logger.experiment.metrics = rows
            logger.save()
    return loggers


def make_logger(
    key: str, node: DictConfig, config: DictConfig, folder: Path, past: Past | None
) -> Any:
    """Returns one logger. wandb's project and MLflow's experiment are the experiment, and their run
    has the run's name, unless the configuration names them."""
    logger_class = get_class(node._target_)
    arguments: dict[str, Any] = {}
    # a logger of a user's own need not write files
    if "save_dir" in inspect.signature(logger_class).parameters:
        arguments["save_dir"] = str(folder)
    if issubclass(logger_class, FOLDER_LOGGERS):
        if node.get("name"):
            raise ConfigError(
                f"{origin_of(config, f'logger.{key}')}: logger.{key}.name: "
                f"{logger_class.__name__} writes into the run's folder; leave it out, or name the "
                "run by name="
            )
        arguments |= {"name": "", "version": ""}
        if past and issubclass(logger_class, TensorBoardLogger):
            arguments["purge_step"] = past.step
    elif issubclass(logger_class, WandbLogger | MLFlowLogger):
        arguments |= service_arguments(logger_class, key, config, folder, past)
    supplied = {name: value for name, value in arguments.items() if node.get(name) is None}
    try:
        return build(node, **supplied)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{origin_of(config, f'logger.{key}')}: logger.{key}: {logger_class.__name__} needs a "
            f"package that is not installed: {first_line(error)}"
        ) from None


def service_arguments(
    logger_class: type, key: str, config: DictConfig, folder: Path, past: Past | None
) -> dict[str, Any]:
    """Returns what tells a tracking service which run this is.

    Raises ConfigError for an address: the run's file would hold it, and whoever goes on with a
    stranger's run would send it there.
    """
    for name in ADDRESS_KEYS:
        if config.logger[key].get(name) is not None:
            raise ConfigError(
                f"{origin_of(config, f'logger.{key}.{name}')}: logger.{key}.{name}: a run names no "
                "address of a service; set MLFLOW_TRACKING_URI or WANDB_BASE_URL in the environment"
            )
    # wandb takes no slash in a project's name, and a recipe's stages have one
    project = str(config.experiment).replace("/", "-")
    run_id = read_ids(folder).get(key) if past else None
    if issubclass(logger_class, WandbLogger):
        arguments: dict[str, Any] = {"project": project, "name": folder.name}
        # `allow` and not `must`: a run that was deleted at the service begins anew there.
        return arguments | ({"id": run_id, "resume": "allow"} if run_id else {})
    arguments = {"experiment_name": project, "run_name": folder.name}
    # Lightning reads the variable once, when it is imported
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    if tracking_uri:
        arguments["tracking_uri"] = tracking_uri
    else:
        # of all runs together, to be compared; MLflow has given up Lightning's default, a folder
        runs = Path(config.runs).expanduser().resolve()
        arguments["tracking_uri"] = f"sqlite:///{runs}/mlflow.db"
        arguments["artifact_location"] = str(runs / "mlruns")
    return arguments | ({"run_id": run_id} if run_id else {})


def read_ids(folder: Path) -> dict[str, str]:
    """Returns the ids of the run at the services, by the logger's key."""
    file = folder / IDS_FILE
    return read_json(file) if file.is_file() else {}


def service_loggers(trainer: Trainer) -> list[Any]:
    """Returns the loggers whose runs lie at a service."""
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | MLFlowLogger)]


def begin_logging(trainer: Trainer, config: DictConfig, plain: dict[str, Any]) -> None:
    """Gives the services the configuration, and keeps their ids in the run's folder."""
    loggers = service_loggers(trainer)
    if not (loggers and trainer.is_global_zero):
        return
    keys = [str(key) for key, node in config.logger.items() if node]
    folder = Path(trainer.default_root_dir)
    earlier_ids = read_ids(folder)
    ids = {}
    for key, logger in zip(keys, trainer.loggers, strict=True):
        if logger in loggers:
            # MLflow refuses other values than those of the start, which a resume may have
            if str(logger.version) != earlier_ids.get(key):
                logger.log_hyperparams(plain)
            ids[key] = str(logger.version)
    write_json(folder / IDS_FILE, ids)


def log_results(trainer: Trainer, metrics: dict[str, float]) -> None:
    """Gives the services the metrics of the evaluation; in the folder they are in results.json."""
    for logger in service_loggers(trainer):
        logger.log_metrics(metrics, step=trainer.global_step)


def finish_loggers(
    trainer: Trainer,
    error_class: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Ends the runs of wandb with a training, as failed where an error ends it: the next training
    of this process would log into a run that is still open. Lightning ends those of MLflow.

    The arguments behind the trainer are those of a context's exit.
    """
    for logger in service_loggers(trainer):
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish(exit_code=0 if error_class is None else 1)


def logged_rows(past: Past) -> list[dict[str, str]]:
    """Returns the rows of metrics.csv until the step that a run goes on from."""
    rows = []
    for row in csv.DictReader(io.StringIO(past.metrics or "")):
        step = row["step"] or ""  # the last row may be half written
        # A row is named by the steps before its own: the checkpoint's last row by one fewer.
        if step.isdecimal() and int(step) < past.step:
            rows.append(row)
    return rows
