"""`owlfuse report`: tables, plots and one page, of what is finished."""

from __future__ import annotations

from pathlib import Path

from owlfuse.ablation.page import write_page
from owlfuse.ablation.plots import write_plots
from owlfuse.ablation.results import load
from owlfuse.ablation.tables import print_tables, write_tables
from owlfuse.config_errors import COMMAND_LINE, ConfigError, hint
from owlfuse.folder_kinds import describe_path
from owlfuse.terminal import visible


def report_command(name: str, words: list[str]) -> None:
    """Writes the report of `runs/<name>`, or of the folder `name`, anew; `baseline=<cell>` is the one word it takes. Raises
    ConfigError where there is no such ablation or cell."""
    if others := [word for word in words if not word.startswith("baseline=")]:
        raise ConfigError(f"{COMMAND_LINE}: {others[0]}: report takes a name or a folder, and baseline=<cell>")
    folder = next((path for path in (Path(name), Path("runs") / name) if (path / "ablation.json").is_file()), None)
    if folder is None:
        if kind := describe_path(Path(name)):
            raise ConfigError(f"{COMMAND_LINE}: report {name}: it {kind}; a report is of an ablation's folder")
        names = [path.parent.name for path in Path("runs").glob("*/ablation.json")]
        raise ConfigError(f"{COMMAND_LINE}: report {name}: there is no runs/{name}/ablation.json{hint(name, names)}")
    write_report(folder, words[-1].partition("=")[2] if words else None)


def write_report(folder: Path, baseline: str | None = None) -> list[str]:
    """Prints the tables and writes `report/`, with differences to the cell `baseline` (the ablation's where none is named);
    returns the keys of cells that failed."""
    results = load(folder, baseline)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    print_tables(results)
    write_tables(results, out)
    plots = write_plots(results, out)
    write_page(results, plots, out / "index.html")
    print(visible(f"the report is {out / 'index.html'}"))
    return [run.key for run in results.runs if run.state == "failed"]
