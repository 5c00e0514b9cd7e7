"""`owlfuse report`: the report of an ablation, anew. Imports nothing heavy until it is written."""

from __future__ import annotations

from pathlib import Path

from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint
from owlfuse.core.folder_kinds import describe_path
from owlfuse.core.terminal import visible


def report_command(name: str, words: list[str]) -> None:
    """Writes the report of `runs/<name>`, or of the folder `name`, anew; `baseline=<cell>` is the
    one word it takes. Raises ConfigError where there is no such ablation or cell."""
    for word in words:
        if not word.startswith("baseline="):
            raise ConfigError(
                f"{COMMAND_LINE}: {word}: report takes a name or a folder, and baseline=<cell>"
            )
    # A folder first: it may lie anywhere.
    for folder in (Path(name), Path("runs") / name):
        if (folder / "ablation.json").is_file():
            write_report(folder, words[-1].partition("=")[2] if words else None)
            return
    if kind := describe_path(Path(name)):
        raise ConfigError(
            f"{COMMAND_LINE}: report {name}: it {kind}; a report is of an ablation's folder"
        )
    names = [path.parent.name for path in Path("runs").glob("*/ablation.json")]
    raise ConfigError(
        f"{COMMAND_LINE}: report {name}: there is no runs/{name}/ablation.json{hint(name, names)}"
    )


def write_report(folder: Path, baseline: str | None = None) -> list[str]:
    """Prints the tables and writes `report/`, with differences to the cell `baseline` (by default
    the ablation's), and returns the keys of cells that failed."""
    # pandas, matplotlib and jinja2 take a second, which a wrong name should not cost.
    from owlfuse.studies.ablation.page import write_page
    from owlfuse.studies.ablation.plots import write_plots
    from owlfuse.studies.ablation.results import load
    from owlfuse.studies.ablation.tables import print_tables, write_tables

    results = load(folder, baseline)
    report = folder / "report"
    report.mkdir(exist_ok=True)
    print_tables(results)
    write_tables(results, report)
    plots = write_plots(results, report)
    write_page(results, plots, report / "index.html")
    print(visible(f"the report is {report / 'index.html'}"))
    return [run.key for run in results.runs if run.state == "failed"]
