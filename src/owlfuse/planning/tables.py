"""The plan of a run, printed."""

from __future__ import annotations

import sys

from omegaconf import DictConfig
from rich.table import Table

from owlfuse.artifacts.init_from import adopt_parts
from owlfuse.core.console import PlainConsole as Console
from owlfuse.core.progress import quiet_libraries
from owlfuse.planning.plan import GB, Estimate, Plan, make_plan


def print_plan(plan: Plan, experiment: str) -> None:
    """Memory of a GPU, work of a step, and what else could be done."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(memory_table(plan, experiment))
    console.print(step_table(plan))
    if plan.others:
        console.print(others_table(plan))
        for number, other in enumerate(plan.others, 1):
            print(f"{number}: {' '.join(other.layout.overrides)}")
    print(verdict(plan))


def gigabytes(count: float) -> str:
    """Of bytes; what is below a hundredth is written as it is."""
    return f"{count / GB:,.2f}" if count >= 0.01 * GB or count == 0 else f"{count / GB:.2g}"


def memory_table(plan: Plan, experiment: str) -> Table:
    """One line for each thing that takes memory."""
    asked, options = plan.asked, plan.options
    table = Table(
        title=f"{experiment}: GB on each of {asked.layout.gpus} GPUs ({asked.layout.describe()})",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("GB", justify="right")
    table.add_column("")
    table.add_row(
        "parameters",
        gigabytes(asked.parameters),
        f"{plan.total:,} in all, {plan.trained:,} trained",
    )
    table.add_row(
        "gradients",
        gigabytes(asked.gradients),
        "of what is trained" + ", twice: in DDP's buckets too" * asked.layout.buckets,
    )
    table.add_row("optimizer state", gigabytes(asked.optimizer), "of what is trained")
    if asked.gathered:
        table.add_row(
            "gathered layers", gigabytes(asked.gathered), "whole while FSDP computes them"
        )
    table.add_row(
        "activations",
        gigabytes(asked.activations),
        "the most at once, read off tensors without memory",
    )
    table.add_row("at once", gigabytes(asked.peak), at_once(asked))
    table.add_row(
        "reserve",
        f"{options.reserve:,.2f}",
        "plan.reserve: CUDA, NCCL and what the allocator rounds up",
    )
    left = options.gpu_memory - options.reserve - asked.peak / GB
    table.add_row(
        "the card",
        f"{options.gpu_memory:,.2f}",
        f"fits, {left:,.1f} to spare" if left >= 0 else f"{-left:,.1f} too little",
    )
    return table


def at_once(estimate: Estimate) -> str:
    """Why the peak may be less than the sum of the lines above it."""
    if estimate.accumulation > 1:
        return "all of these"
    return "the most of these; gradients come while activations go"


def step_table(plan: Plan) -> Table:
    """What an optimizer step does."""
    asked, options = plan.asked, plan.options
    table = Table(title="An optimizer step", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    micro = (
        f"{asked.layout.data} data ranks x {asked.layout.micro} x {asked.accumulation} accumulated"
    )
    table.add_row("samples", f"{plan.global_batch:,}", micro)
    each = f"{plan.length:,} a sample at most, {options.images_per_sample} images among them"
    table.add_row("text tokens", f"{plan.text_tokens:,}", each)
    table.add_row("visual tokens", f"{plan.visual_tokens:,}", "of the connector")
    table.add_row(
        "FLOPs", f"{asked.flops:.3g}", "forward and backward, attention as if not causal, all GPUs"
    )
    rate = (
        f"at {options.share_of_peak:.0%} of {options.peak_tflops:,.0f} TFLOP/s "
        "(plan.share_of_peak, plan.peak_tflops)"
    )
    table.add_row("seconds", f"{asked.seconds:.3g}", rate)
    return table


def others_table(plan: Plan) -> Table:
    """Other layouts of the same global batch on the same GPUs, in GB a GPU."""
    table = Table(title="Other ways on the same GPUs (GB)", title_justify="left")
    head = ("", "way", "param.", "grad.", "optim.", "activ.", "at once", "to spare", "seconds")
    for name in head:
        table.add_column(
            name,
            justify="left" if name in ("", "way") else "right",
            no_wrap=name not in ("", "way"),
        )
    for number, estimate in enumerate(plan.others, 1):
        sizes = (
            estimate.parameters,
            estimate.gradients,
            estimate.optimizer,
            estimate.activations,
            estimate.peak,
        )
        left = plan.options.gpu_memory - plan.options.reserve - estimate.peak / GB
        mark = f"{left:,.1f}" if plan.fits(estimate) else f"[red]{left:,.1f}[/red]"
        row = *(f"{size / GB:,.1f}" for size in sizes), mark, f"{estimate.seconds:.3g}"
        table.add_row(str(number), estimate.layout.describe(), *row)
    return table


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and the least change with which it does."""
    if plan.fits(plan.asked):
        return "It fits."
    least = next((estimate for estimate in plan.others if plan.fits(estimate)), None)
    if least is None:
        return (
            "It does not fit, and no other way on these GPUs does: take more or larger GPUs "
            "(plan.gpus, plan.gpu_memory)."
        )
    return (
        f"It does not fit. The least change with which it does: {' '.join(least.layout.overrides)}"
    )


@quiet_libraries()
def dry_run(config: DictConfig) -> None:
    """Prints what a training of this configuration would need.

    Raises ConfigError, see `make_plan`.
    """
    if config.get("init_from") and not config.resume:
        adopt_parts(config)
    print_plan(make_plan(config), config.experiment)
