"""One HTML page of an ablation that needs nothing else: no network, no script, pictures inside."""

from __future__ import annotations

import base64
import re
from datetime import datetime
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from owlfuse.config.identity import flat
from owlfuse.core.errors import COMMAND_LINE, ConfigError, hint
from owlfuse.core.files import atomic_write
from owlfuse.core.folder_kinds import describe_path
from owlfuse.core.terminal import visible
from owlfuse.studies.ablation.plots import write_plots
from owlfuse.studies.ablation.results import Results, Row, Run, load
from owlfuse.studies.ablation.tables import (
    cells_of,
    factors_shown,
    heads,
    notes,
    paper_table,
    print_tables,
    write_tables,
)

SAMPLES = 8
"""Questions whose answers stand side by side."""
THUMBNAIL = 128
"""Pixels of the longer side."""
ALT = {
    "scores": "Scores of the cells with intervals; the numbers are those of the table",
    "learning_curves": "Loss over optimizer steps",
    "score_against_cost": "Score against throughput, memory and time per generated token",
}
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def write_page(results: Results, plots: dict[str, Path], path: Path) -> None:
    """The page, written atomically."""
    record = results.record
    body = [
        f"<h1>{escape(record['name'])}</h1>",
        f"<p class='question'>{escape(record['question'])}</p>",
        left_out(results),
        "<h2>Results</h2>",
        results_table(results),
        *paper(results),
        f"<ul class='notes'>{''.join(f'<li>{escape(line)}</li>' for line in notes(results))}</ul>",
        "<h2>Plots</h2>",
        *(
            f"<figure>{image(svg.read_bytes(), 'image/svg+xml', ALT[name])}</figure>"
            for name, svg in plots.items()
        ),
        "<h2>Answers side by side</h2>",
        *answers(results),
        "<h2>What differs in the configurations</h2>",
        differences(results),
        "<h2>Where this comes from</h2>",
        origin(results),
    ]
    head = (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        "<link rel='icon' href='data:,'>\n"
        f"<title>{escape(record['name'])}: ablation</title>\n<style>\n{STYLE}</style>\n</head>\n"
    )
    with atomic_write(path) as file:
        file.write(f"{head}<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n")


def table(
    head: list[str], rows: list[list[str]], escaped: bool = False, kind: str = "texts"
) -> str:
    """A table that scrolls by itself where the screen is narrow; the first column names the row.
    Texts are escaped unless they are HTML already."""
    shown = (lambda text: text) if escaped else escape
    top = "".join(f"<th scope='col'>{breakable(text)}</th>" for text in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{shown(text)}</td>" for text in others)
        lines.append(f"<tr><th scope='row'>{shown(first)}</th>{cells}</tr>")
    body_rows = "\n".join(lines)
    body = f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body_rows}\n</tbody>"
    return f"<div class='scroll' tabindex='0'><table class='{kind}'>{body}</table></div>"


def breakable(name: str) -> str:
    """A metric's or cell's name that may go on in a new line after its signs."""
    return re.sub(r"([/_-])", r"\1<wbr>", escape(name))


def results_table(results: Results) -> str:
    """Means with their differences below them, and costs."""
    head = [text for text in heads(results) if text != "difference"]
    first = len(factors_shown(results)) + 2
    last = first + 2 * len(results.metrics)
    rows = []
    for row in results.rows:
        texts = [escape(text) for text in cells_of(results, row)]
        scores = [
            f"<span class='whole'>{mean}<br><small>{other}</small></span>"
            for mean, other in zip(texts[first:last:2], texts[first + 1 : last : 2])
        ]
        rows.append([*texts[:first], *scores, *texts[last:]])
    return table(head, rows, escaped=True, kind="numbers")


def image(content: bytes, kind: str, alt: str) -> str:
    """A picture inside of the page."""
    return (
        f"<img alt='{escape(alt, quote=True)}' "
        f"src='data:{kind};base64,{base64.b64encode(content).decode()}'>"
    )


def left_out(results: Results) -> str:
    """What does not count, in front of all numbers."""
    left = [run for run in results.runs if not run.finished]
    if not left:
        return f"<p>All {len(results.runs)} runs are finished.</p>"
    lines = "".join(
        (
            f"<li><code>{escape(run.key)}</code>: "
            f"<strong>{escape(run.state)}</strong>{escape(run.why)}</li>"
        )
        for run in left
    )
    done = len(results.runs) - len(left)
    said = f"{done} of {len(results.runs)} runs are finished. These do not count:"
    return f"<div class='warning'><p>{said}</p><ul>{lines}</ul></div>"


def paper(results: Results) -> list[str]:
    """The paper's numbers beside ours."""
    if not results.record.get("paper"):
        return []
    title, head, rows = paper_table(results)
    return [f"<h3>In the paper: {escape(title)}</h3>", table(head, rows)]


def answers(results: Results) -> list[str]:
    """The same questions for all cells, those first whose answers differ in being right; one
    finished seed of each cell."""
    source = results.record["metrics"][results.metrics[0]][0]
    seeds = [
        seed
        for seed in results.record["seeds"]
        if sum(seed in seeds_of(row) for row in results.rows)
    ]
    if not seeds:
        return ["<p>No run is finished yet.</p>"]
    seed = max(seeds, key=lambda seed: sum(seed in seeds_of(row) for row in results.rows))
    runs: list[Run] = [run for row in results.rows for run in row.finished if run.seed == seed]
    asked = [run.answers(source) for run in runs]
    shared = [question for question in asked[0] if all(question in one for one in asked)]
    mixed = [q for q in shared if len({one[q]["right"] for one in asked}) > 1]
    picked = spread(mixed, SAMPLES * 3 // 4)
    picked += spread(
        [q for q in shared if q not in picked and q not in mixed], SAMPLES - len(picked)
    )
    if not picked:
        return ["<p>The cells have no question in common.</p>"]
    rows = []
    for question in picked:
        first = asked[0][question]
        title = f"{picture(first['image'])}<span>{escape(first['question'])}</span>"
        rows.append(
            [
                title,
                f"<q>{escape(first['expected'])}</q>",
                *(answer(one[question]) for one in asked),
            ]
        )
    told = (
        f"Validation source {source}, seed {seed}; questions first that not all cells answer alike."
    )
    return [
        f"<p>{escape(told)}</p>",
        table(["question", "expected", *(run.cell for run in runs)], rows, escaped=True),
    ]


def seeds_of(row: Row) -> set[int]:
    """The finished ones."""
    return {run.seed for run in row.finished}


def spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def answer(found: dict[str, Any]) -> str:
    """Right or wrong by a sign and a word, not by color alone."""
    kind, sign = ("right", "✓") if found["right"] else ("wrong", "✗")
    text = found["answer"] if len(found["answer"]) <= 120 else found["answer"][:119] + "…"
    return (
        f"<span class='{kind}'><span aria-hidden='true'>{sign}</span> <b>{kind}</b></span> "
        f"{escape(text) or '(nothing)'}"
    )


def picture(path: str | None) -> str:
    """A thumbnail, or that there is none."""
    if path is None:
        return ""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except OSError:
        return "<em>picture not found</em>"
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "PNG" if max(small.size) <= 64 else "JPEG", quality=85)
    kind = "image/png" if max(small.size) <= 64 else "image/jpeg"
    return image(file.getvalue(), kind, "the picture that is asked about")


def differences(results: Results) -> str:
    """The keys that are not the same in all cells."""
    configs = [flat(row.config) for row in results.rows]
    keys = sorted({key for config in configs for key in config} - {"name"})
    rows = []
    for key in keys:
        values = [str(config[key]) if key in config else "-" for config in configs]
        if len(set(values)) > 1:
            rows.append([key, *values])
    if not rows:
        return "<p>Nothing: there is one cell.</p>"
    return table(["key", *(row.name for row in results.rows)], rows)


def origin(results: Results) -> str:
    """Versions, commits, hashes, the machine, the date, and how to run it again."""
    finished = [run for run in results.runs if run.finished]
    facts = {"experiment": results.record["base"], "written": f"{datetime.now():%Y-%m-%d %H:%M}"}
    facts["machine"] = results.record.get("machine", "-")
    facts["commit"] = ", ".join(sorted({str(run.results["git"]) for run in finished})) or "-"
    facts["code"] = ", ".join(sorted({run.results["hash"]["code"] for run in finished})) or "-"
    for name, version in (finished[0].results["versions"] if finished else {}).items():
        facts[name] = version
    facts["training"] = f"{sum(run.results['wall_s'] for run in finished) / 60:.1f} min in all"
    rows = [[name, value] for name, value in facts.items()]
    rows += [[f"configuration of {run.key}", run.results["hash"]["config"]] for run in finished]
    command = (
        f"owlfuse ablate {results.record['name']} {' '.join(results.record.get('words', []))}"
    ).strip()
    said = f"<details><summary>Versions and hashes</summary>{table(['', ''], rows)}</details>"
    return f"<p><code>{escape(command)}</code></p>{said}"


def report_command(name: str, words: list[str]) -> None:
    """Writes the report of `runs/<name>`, or of the folder `name`, anew; `baseline=<cell>` is the
    one word it takes. Raises ConfigError where there is no such ablation or cell."""
    if others := [word for word in words if not word.startswith("baseline=")]:
        raise ConfigError(
            f"{COMMAND_LINE}: {others[0]}: report takes a name or a folder, and baseline=<cell>"
        )
    folder = next(
        (path for path in (Path(name), Path("runs") / name) if (path / "ablation.json").is_file()),
        None,
    )
    if folder is None:
        if kind := describe_path(Path(name)):
            raise ConfigError(
                f"{COMMAND_LINE}: report {name}: it {kind}; a report is of an ablation's folder"
            )
        names = [path.parent.name for path in Path("runs").glob("*/ablation.json")]
        raise ConfigError(
            f"{COMMAND_LINE}: report {name}: there is no "
            f"runs/{name}/ablation.json{hint(name, names)}"
        )
    write_report(folder, words[-1].partition("=")[2] if words else None)


def write_report(folder: Path, baseline: str | None = None) -> list[str]:
    """Prints the tables and writes `report/`, with differences to the cell `baseline` (the
    ablation's where none is named); returns the keys of cells that failed."""
    results = load(folder, baseline)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    print_tables(results)
    write_tables(results, out)
    plots = write_plots(results, out)
    write_page(results, plots, out / "index.html")
    print(visible(f"the report is {out / 'index.html'}"))
    return [run.key for run in results.runs if run.state == "failed"]
