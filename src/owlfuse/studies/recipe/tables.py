"""The tables of `owlfuse recipe`: what each stage trains, and what it reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from owlfuse.artifacts.runs import metrics_of
from owlfuse.config.build import to_dict
from owlfuse.core.console import count, show
from owlfuse.planning.plan import GB, make_plan

if TYPE_CHECKING:
    from owlfuse.studies.recipe.stages import Stage

SHOWN = ("exact_match", "exact_match_blank", "exact_match_held_out", "loss")
"""Metrics of the last table."""


def print_stages(recipe: str, stages: list[Stage]) -> None:
    """A line a stage: parts and how they are trained with the parameters trained, steps, global
    batch, peak learning rate, side of the pictures in pixels, and each source's share."""
    table = Table(title=f"{recipe}: the stages", title_justify="left", show_lines=True)
    for column in ("stage", "trained", "frozen", "steps", "batch", "lr", "pictures", "mixture"):
        table.add_column(
            column, justify="right" if column in ("steps", "batch", "pictures") else "left"
        )
    for stage in stages:
        plain = to_dict(stage.config)
        trained = [f"{s.part}: {s.policy}, {count(s.trained)}" for s in stage.parts if s.trained]
        frozen = [f"{s.part}: {count(s.frozen)}" for s in stage.parts if s.frozen]
        size = plain["model"]["vision"].get("image_size")
        table.add_row(
            stage.name,
            "\n".join(trained),
            "\n".join(frozen),
            f"{plain['trainer']['max_steps']:,}",
            f"{plain['data']['global_batch_size']:,}",
            rates(plain["optim"]),
            f"{size} px" if size else "the model's",
            mixture(plain["data"]["sources"], plain["data"].get("temperature")),
        )
    show(table)


def print_plans(recipe: str, stages: list[Stage]) -> None:
    """A line a stage: what its step needs of each GPU, and its time, for the GPUs that `plan`
    names (see `owlfuse.planning.plan`)."""
    if not all(
        stage.config.plan.gpus or isinstance(stage.config.trainer.devices, int) for stage in stages
    ):
        print(
            "what a step of each stage needs: the same command with plan.gpus=8 plan.gpu_memory=80"
        )
        return
    table = Table(title=f"{recipe}: GB on each GPU, and time", title_justify="left")
    for column in (
        "stage",
        "GPUs",
        "params",
        "grads",
        "optim.",
        "activ.",
        "at once",
        "to spare",
        "FLOPs/step",
        "days",
    ):
        table.add_column(column, justify="left" if column in ("stage", "GPUs") else "right")
    for stage in stages:
        plan = make_plan(stage.config, compare=False)
        asked = plan.asked
        spare = plan.options.gpu_memory - plan.options.reserve - asked.peak / GB
        sizes = asked.parameters, asked.gradients, asked.optimizer, asked.activations, asked.peak
        days = asked.seconds * stage.config.trainer.max_steps / 86400
        way = f"{asked.layout.gpus}: {asked.layout.describe()}"
        numbers = (
            *(f"{size / GB:,.1f}" for size in sizes),
            f"{spare:,.1f}" if spare >= 0 else f"[red]{spare:,.1f}[/red]",
        )
        table.add_row(stage.name, way, *numbers, f"{asked.flops:.2g}", f"{days:.2g}")
    show(table)
    print(
        "more of a stage: owlfuse train experiment="
        + f"{recipe}/{stages[0].name} dry_run=true plan.gpus=8 plan.gpu_memory=80"
    )


def rates(optim: dict[str, Any]) -> str:
    """The peak learning rate, those of parts that differ, and the warm-up."""
    lines = [f"{optim['lr']:g}"] if "lr" in optim else []
    lines += [
        f"{part} {rate:g}"
        for part, rate in (optim.get("part_lr") or {}).items()
        if rate is not None
    ]
    lines += [
        f"{part}: x {decay:g} a layer"
        for part, decay in (optim.get("layer_decay") or {}).items()
        if decay is not None
    ]
    lines += [f"warm-up {optim['warmup_steps']:,}"] if optim.get("warmup_steps") else []
    return "\n".join(lines)


def mixture(sources: dict[str, Any], temperature: float | None = None) -> str:
    """Each source's share of the weights, without those that are not drawn; with a temperature,
    their sizes decide too."""
    weights = {name: source.get("weight", 1.0) for name, source in sources.items()}
    total = sum(weights.values())
    shares = sorted(
        ((weight / total, name) for name, weight in weights.items() if weight and total),
        reverse=True,
    )
    if temperature is not None:
        return "\n".join([f"by size, temperature {temperature:g}", *(name for _, name in shares)])
    return "\n".join(f"{name} {share:.1%}" for share, name in shares)


def print_results(recipe: str, stages: list[Stage]) -> None:
    """A line a stage: the chief metrics of its results.json."""
    rows = {stage.name: metrics_of(stage.folder) for stage in stages}
    names = [name for row in rows.values() for name in row if name.partition("/")[2] in SHOWN]
    names = sorted(dict.fromkeys(names))
    table = Table("stage", *names, title=f"{recipe}: what the stages reached", title_justify="left")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[metric]:.3f}" if metric in row else "" for metric in names))
    show(table)
