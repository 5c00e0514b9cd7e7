"""`owlfuse report`: tables, plots and one page, of what is finished."""

from __future__ import annotations

from pathlib import Path

from owlfuse.ablation.page import write_page
from owlfuse.ablation.plots import write_plots
from owlfuse.ablation.results import load
from owlfuse.ablation.tables import print_tables, write_tables
from owlfuse.config_errors import COMMAND_LINE, ConfigError, hint


def report_command(name: str, words: list[str]) -> None:
    """Writes the report of `runs/<name>`, or of the folder `name`, anew. Raises ConfigError where there is no such ablation."""
    if words:
        raise ConfigError(f"{COMMAND_LINE}: {words[0]}: report takes a name or a folder alone")
    folder = next((path for path in (Path(name), Path("runs") / name) if (path / "ablation.json").is_file()), None)
    if folder is None:
        names = [path.parent.name for path in Path("runs").glob("*/ablation.json")]
        raise ConfigError(f"{COMMAND_LINE}: report {name}: there is no runs/{name}/ablation.json{hint(name, names)}")
    write_report(folder)


def write_report(folder: Path) -> list[str]:
    """Prints the tables and writes `report/`; returns the keys of cells that failed."""
    results = load(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    print_tables(results)
    write_tables(results, out)
    plots = write_plots(results, out)
    write_page(results, plots, out / "index.html")
    print(f"the report is {out / 'index.html'}")
    return [run.key for run in results.runs if run.state == "failed"]
