"""The plan of a run, printed."""

from __future__ import annotations

import pandas as pd
from omegaconf import DictConfig
from rich.table import Table

from owlfuse.artifacts.init_from import adopt_parts
from owlfuse.core.console import show
from owlfuse.core.progress import quiet_libraries
from owlfuse.planning.frames import terminal_table
from owlfuse.planning.plan import GB, Estimate, Plan, make_plan


def print_plan(plan: Plan, experiment: str) -> None:
    """Prints the memory of a GPU, the work of a step, and what other layouts would need."""
    show(memory_table(plan, experiment))
    show(step_table(plan))
    if plan.alternatives:
        show(alternatives_table(plan))
        for number, estimate in enumerate(plan.alternatives, 1):
            print(f"{number}: {' '.join(estimate.layout.overrides)}")
    print(verdict(plan))
    if plan.precision == "32-true":
        print(
            "All of it is in 32-true, as the configuration's trainer says, and the seconds are at "
            "the peak of 16 bits; for GPUs plan with trainer=fsdp or trainer.precision=bf16-mixed."
        )


def gigabytes(size: float) -> str:
    """Return bytes in GB; what is below a hundredth is written as it is."""
    if size == 0 or size >= 0.01 * GB:
        return f"{size / GB:,.2f}"
    return f"{size / GB:.2g}"


def spare_gigabytes(plan: Plan, estimate: Estimate) -> float:
    """Return the memory of a card that a layout leaves, negative where it needs more."""
    return plan.options.gpu_memory - plan.options.reserve - estimate.peak / GB


def size_texts(plan: Plan, estimate: Estimate) -> dict[str, str]:
    """Return the memory of a GPU in GB by the names of columns, and what a layout leaves of it."""
    sizes = {
        "param.": estimate.parameters,
        "grad.": estimate.gradients,
        "optim.": estimate.optimizer,
        "activ.": estimate.activations,
        "at once": estimate.peak,
    }
    texts = {name: f"{size / GB:,.1f}" for name, size in sizes.items()}
    texts["to spare"] = f"{spare_gigabytes(plan, estimate):,.1f}"
    return texts


def remarks_table(title: str, unit: str, rows: list[tuple[str, str, str]]) -> Table:
    """Return a table of names, amounts in a unit, and remarks."""
    table = Table("", title=title, title_justify="left")
    table.add_column(unit, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(*row)
    return table


def memory_table(plan: Plan, experiment: str) -> Table:
    """Return a line for each thing that takes memory."""
    estimate, options = plan.estimate, plan.options
    gradients = "of what is trained"
    if estimate.layout.buckets:
        gradients += ", twice: in DDP's buckets too"
    rows = [
        (
            "parameters",
            gigabytes(estimate.parameters),
            f"{plan.total:,} in all, {plan.trained:,} trained",
        ),
        ("gradients", gigabytes(estimate.gradients), gradients),
        ("optimizer state", gigabytes(estimate.optimizer), "of what is trained"),
    ]
    if estimate.gathered:
        size = gigabytes(estimate.gathered)
        rows.append(("gathered layers", size, "whole while FSDP computes them"))
    activations = "the most at once, read off tensors without memory"
    rows.append(("activations", gigabytes(estimate.activations), activations))
    # With a single micro batch gradients take the room that activations leave.
    at_once = "the most of these; gradients come while activations go"
    if estimate.accumulation > 1:
        at_once = "all of these"
    rows.append(("at once", gigabytes(estimate.peak), at_once))
    reserve = "plan.reserve: CUDA, NCCL and what the allocator rounds up"
    rows.append(("reserve", f"{options.reserve:,.2f}", reserve))
    spare = spare_gigabytes(plan, estimate)
    fits = f"fits, {spare:,.1f} to spare" if spare >= 0 else f"{-spare:,.1f} too little"
    rows.append(("the card", f"{options.gpu_memory:,.2f}", fits))
    layout = estimate.layout
    title = (
        f"{experiment}: GB on each of {layout.gpus} GPUs ({layout.describe()}), {plan.precision}"
    )
    return remarks_table(title, "GB", rows)


def step_table(plan: Plan) -> Table:
    """Return what an optimizer step does."""
    estimate, options = plan.estimate, plan.options
    layout = estimate.layout
    samples = f"{layout.data} data ranks x {layout.micro} x {estimate.accumulation} accumulated"
    tokens = f"{plan.length:,} a sample at most, {options.images_per_sample} images among them"
    flops = "forward and backward, attention as if not causal, all GPUs"
    rate = (
        f"at {options.share_of_peak:.0%} of {options.peak_tflops:,.0f} TFLOP/s "
        "(plan.share_of_peak, plan.peak_tflops)"
    )
    rows = [
        ("samples", f"{plan.global_batch:,}", samples),
        ("text tokens", f"{plan.text_tokens:,}", tokens),
        ("visual tokens", f"{plan.visual_tokens:,}", "of the connector"),
        ("FLOPs", f"{estimate.flops:.3g}", flops),
        ("seconds", f"{estimate.seconds:.3g}", rate),
    ]
    return remarks_table("An optimizer step", "", rows)


def alternatives_table(plan: Plan) -> Table:
    """Return other layouts of the same global batch on the same GPUs, in GB of a GPU."""
    records = []
    for number, estimate in enumerate(plan.alternatives, 1):
        records.append(
            {
                "": str(number),
                "way": estimate.layout.describe(),
                **size_texts(plan, estimate),
                "seconds": f"{estimate.seconds:.3g}",
            }
        )
    title = "Other ways on the same GPUs (GB)"
    return terminal_table(pd.DataFrame(records), title, text_columns=2)


def verdict(plan: Plan) -> str:
    """Return one line: whether it fits, and the least change with which it does."""
    if plan.fits(plan.estimate):
        return "It fits."
    for estimate in plan.alternatives:  # from the least change to the greatest
        if plan.fits(estimate):
            overrides = " ".join(estimate.layout.overrides)
            return f"It does not fit. The least change with which it does: {overrides}"
    return (
        "It does not fit, and no other way on these GPUs does: take more or larger GPUs "
        "(plan.gpus, plan.gpu_memory)."
    )


@quiet_libraries()
def dry_run(config: DictConfig) -> None:
    """Prints what a training of this configuration would need.

    Raises ConfigError, see `make_plan`.
    """
    # The parts are those of the model that training starts from.
    if config.get("init_from") and not config.resume:
        adopt_parts(config)
    print_plan(make_plan(config), config.experiment)
