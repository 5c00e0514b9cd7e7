"""The tables of `owlfuse recipe`: what each stage trains, needs, and reached."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.table import Table

from owlfuse.artifacts.runs import metrics_of
from owlfuse.config.build import to_dict
from owlfuse.core.console import count, show
from owlfuse.planning.frames import terminal_table
from owlfuse.planning.plan import make_plan
from owlfuse.planning.tables import size_texts
from owlfuse.studies.recipe.stages import Stage

SHOWN_METRICS = ("exact_match", "exact_match_blank", "exact_match_held_out", "loss")


def print_stages(recipe: str, stages: list[Stage]) -> None:
    """Prints a line for each stage: parts and how they are trained with the parameters trained,
    steps, global batch, peak learning rate, size of the pictures, and each source's share."""
    table = Table(title=f"{recipe}: the stages", title_justify="left", show_lines=True)
    for column in ("stage", "trained", "frozen", "steps", "batch", "lr", "pictures", "mixture"):
        is_number = column in ("steps", "batch", "pictures")
        table.add_column(column, justify="right" if is_number else "left")
    for stage in stages:
        config = to_dict(stage.config)
        trained = []
        frozen = []
        for part in stage.parts:
            if part.trained:
                trained.append(f"{part.part}: {part.policy}, {count(part.trained)}")
            if part.frozen:
                frozen.append(f"{part.part}: {count(part.frozen)}")
        size = config["model"]["vision"].get("image_size")
        table.add_row(
            stage.name,
            "\n".join(trained),
            "\n".join(frozen),
            f"{config['trainer']['max_steps']:,}",
            f"{config['data']['global_batch_size']:,}",
            rates(config["optim"]),
            f"{size} px" if size else "the model's",
            mixture(config["data"]["sources"], config["data"].get("temperature")),
        )
    show(table)


def print_plans(recipe: str, stages: list[Stage]) -> None:
    """Prints a line for each stage: what its step needs of each GPU, and its time, for the GPUs
    that `plan` names (see `owlfuse.planning.plan`)."""
    for stage in stages:
        if not stage.config.plan.gpus and not isinstance(stage.config.trainer.devices, int):
            # How many GPUs there will be is not known on the machine that plans.
            print(
                "what a step of each stage needs: the same command with plan.gpus=8 "
                "plan.gpu_memory=80"
            )
            return
    records = []
    for stage in stages:
        plan = make_plan(stage.config, compare=False)
        estimate = plan.estimate
        days = estimate.seconds * stage.config.trainer.max_steps / 86400
        records.append(
            {
                "stage": stage.name,
                "GPUs": f"{estimate.layout.gpus}: {estimate.layout.describe()}",
                **size_texts(plan, estimate),
                "FLOPs/step": f"{estimate.flops:.2g}",
                "days": f"{days:.2g}",
            }
        )
    frame = pd.DataFrame(records).rename(columns={"param.": "params", "grad.": "grads"})
    show(terminal_table(frame, f"{recipe}: GB on each GPU, and time", text_columns=2))
    print(
        f"more of a stage: owlfuse train experiment={recipe}/{stages[0].name} dry_run=true "
        "plan.gpus=8 plan.gpu_memory=80"
    )


def rates(optim: dict[str, Any]) -> str:
    """Return the peak learning rate, those of parts that differ, and the warm-up."""
    lines = []
    if "lr" in optim:
        lines.append(f"{optim['lr']:g}")
    for part, rate in (optim.get("part_lr") or {}).items():
        if rate is not None:
            lines.append(f"{part} {rate:g}")
    for part, decay in (optim.get("layer_decay") or {}).items():
        if decay is not None:
            lines.append(f"{part}: x {decay:g} a layer")
    if optim.get("warmup_steps"):
        lines.append(f"warm-up {optim['warmup_steps']:,}")
    return "\n".join(lines)


def mixture(sources: dict[str, Any], temperature: float | None) -> str:
    """Return each source's share of the weights, without those that are not drawn; with a
    temperature the sizes decide too, so that only the names are known."""
    weights = pd.Series({name: source.get("weight", 1.0) for name, source in sources.items()})
    shares = weights[weights > 0] / weights.sum()
    # Of equal shares the last name stands first, as in a descending sort of pairs.
    shares = shares.sort_index(ascending=False).sort_values(ascending=False, kind="stable")
    if temperature is not None:
        return "\n".join([f"by size, temperature {temperature:g}", *shares.index])
    return "\n".join(f"{name} {share:.1%}" for name, share in shares.items())


def print_results(recipe: str, stages: list[Stage]) -> None:
    """Prints a line for each stage: the chief metrics of its results.json."""
    records = []
    for stage in stages:
        metrics = metrics_of(stage.folder)
        # Accuracies by kind of question would not fit into a line.
        texts = {}
        for name, value in metrics.items():
            if name.partition("/")[2] in SHOWN_METRICS:
                texts[name] = f"{value:.3f}"
        records.append(texts)
    frame = pd.DataFrame(records).sort_index(axis=1)
    # After the sort, which would put it among the metrics.
    frame.insert(0, "stage", [stage.name for stage in stages])
    show(terminal_table(frame, f"{recipe}: what the stages reached"))
