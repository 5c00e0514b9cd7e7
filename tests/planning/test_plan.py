"""The plan of a run against real steps: bytes that autograd keeps, bytes alive, FLOPs,
parameters and optimizer state."""

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from helpers import (
    CONNECTORS,
    FUSIONS,
    ROWS,
    VARIANTS,
    VIT,
    VOCAB,
    each,
    llm_fields,
    make_batch,
    model_node,
    policy,
)
from owlfuse.__main__ import main
from owlfuse.config.compose import PlanOptions, compose
from owlfuse.core.errors import ConfigError
from owlfuse.core.types import Batch
from owlfuse.model.loss import token_loss
from owlfuse.model.multimodal import MultimodalLM, build_model, on_meta
from owlfuse.planning.meter import measure_step
from owlfuse.planning.plan import (
    GB,
    Layout,
    Workload,
    alternative_layouts,
    checkpointing_keys,
    configured_layout,
    make_plan,
)
from owlfuse.planning.step import (
    Precision,
    bytes_of,
    measure_batch,
    meta_batch,
    meta_model,
    optimizer_bytes,
    rank_model,
    with_checkpointing,
)
from owlfuse.training import train
from owlfuse.training.optim import AdamWCosine, MuonCosine

LLAMA = llm_fields(hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16)


def loss_of(model: MultimodalLM, batch: Batch) -> Tensor:
    return token_loss(model(batch), batch.labels)[0]


def tensors_of(batch: Batch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


@each({**FUSIONS, **VARIANTS})
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.fast_cases(4)
def test_what_is_read_off_meta_tensors_is_what_real_ones_need(node, checkpointing):
    """The same hooks on real tensors: bytes kept, FLOPs, and the most alive, to the byte."""
    nodes = model_node(node, gradient_checkpointing=checkpointing)
    real, planned = build_model(nodes, VOCAB)[0].train(), on_meta(nodes, VOCAB)[0].train()
    batch = make_batch(ROWS, real.fusion.tokens_per_image)
    reading = measure_batch(planned, batch.to("meta"))
    truth = measure_step(real, lambda: loss_of(real, batch), tensors_of(batch))
    assert (reading.saved, reading.forward, reading.backward) == (
        truth.saved,
        truth.forward,
        truth.backward,
    )
    assert (reading.activations, reading.peak()) == (truth.activations, truth.peak())
    assert reading.saved > 0
    assert reading.peak() < reading.peak(bytes_of(real.parameters()))


def profiled_peak(step, path: Path) -> int:
    """The most bytes allocated at once on top of what was there, by torch's profiler, kernels'
    own scratch included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [
        event
        for event in json.loads(path.read_text())["traceEvents"]
        if event.get("name") == "[memory]"
    ]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(accumulate(sizes))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.fast_cases(1)
def test_the_peak_is_that_of_torchs_profiler_within_a_hundredth(tmp_path, checkpointing):
    llm = llm_fields(hidden_size=128, intermediate_size=256, head_dim=32, num_hidden_layers=6)
    nodes = model_node("modality_adaptive", llm=llm, gradient_checkpointing=checkpointing)
    real, planned = build_model(nodes, VOCAB)[0].train(), on_meta(nodes, VOCAB)[0].train()
    rows = [[*range(6, 90), "image", *range(6, 90)], [*range(6, 70)]] * 2
    batch = make_batch(rows, real.fusion.tokens_per_image)
    truth = profiled_peak(lambda: loss_of(real, batch).backward(), tmp_path / "trace.json")
    inputs = sum(t.numel() * t.element_size() for t in tensors_of(batch))
    assert measure_batch(planned, batch.to("meta")).peak() - inputs == pytest.approx(
        truth, rel=0.01
    )


def test_flops_are_those_of_the_formula_and_less_for_what_is_frozen():
    """Two for each weight and token in the forward, four in the backward; two where only the
    input's gradient is needed."""
    planned = meta_model(model_node("concat", llm=LLAMA), VOCAB)
    batch = meta_batch(planned, rows=3, length=20, images=0)
    d, kv, hidden, tokens = 64, 32, 96, 3 * 20
    layer = d * d * 2 + d * kv * 2 + 3 * d * hidden
    # two products of (20, 16) and (16, 20) for each of 3 rows and 4 heads
    attention = 2 * 2 * 3 * 4 * 20 * 20 * 16
    forward = 2 * (2 * tokens * layer + attention) + 2 * tokens * d * VOCAB
    picture = read_picture(planned)
    reading = measure_batch(planned, batch)
    assert reading.forward - picture.forward == pytest.approx(
        forward, rel=1e-3
    )  # transformers' rotary tables, in some versions
    backward = 2 * (4 * tokens * layer + 5 * attention // 2) + 4 * tokens * d * VOCAB
    assert reading.backward - picture.backward == backward
    frozen = meta_model(model_node("concat", llm=LLAMA, adapter={"llm": policy("Frozen")}), VOCAB)
    less = measure_batch(frozen, batch)
    assert less.forward == reading.forward
    assert less.backward - picture.backward == backward - 2 * tokens * (2 * layer + d * VOCAB)


def read_picture(model: MultimodalLM):
    """Of backbone and connector alone, on one picture."""
    pixels = torch.zeros(1, 3, *model.vision.preprocessing.size, device="meta")
    reading = measure_step(model, lambda: model.connector(model.vision(pixels)).sum())
    model.zero_grad()
    return reading


def test_flops_of_a_step_without_attention_are_torchs_own_count():
    model = build_model(model_node("concat", connector=CONNECTORS["mlp"]), VOCAB)[0].connector
    features = torch.randn(5, 7, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(features).sum().backward()
    reading = measure_step(model, lambda: model(features).sum())
    assert reading.forward + reading.backward == counter.get_total_flops() > 0


@pytest.mark.parametrize("optim", [AdamWCosine(), MuonCosine()], ids=["adamw", "muon"])
@pytest.mark.parametrize("llm", ["Full", "LoRA", "Frozen"])
def test_parameters_gradients_and_optimizer_state_are_those_after_a_real_step(optim, llm):
    """And the optimizer holds nothing for what is frozen."""
    nodes = model_node(
        "hyperattention-adaptive", adapter={"llm": policy(llm), "vision": policy("Frozen")}
    )
    real, planned = build_model(nodes, VOCAB)[0].train(), meta_model(nodes, VOCAB)
    assert bytes_of(planned.parameters()) == bytes_of(real.parameters())
    optimizer = optim.build(real, 10)["optimizer"]
    loss_of(real, make_batch(ROWS)).backward()
    optimizer.step()
    trained = {id(p) for p in real.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == trained
    assert {id(p) for p in real.parameters() if p.grad is not None} == trained
    state = [
        value
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    assert optimizer_bytes(planned, optim) == bytes_of(state)
    assert bytes_of(p for p in planned.parameters() if p.requires_grad) == bytes_of(
        p.grad for p in real.parameters() if p.requires_grad
    )


@pytest.mark.parametrize(
    ("fusion", "reads"), [("concat", False), ("hyperattention-adaptive", True)]
)
def test_tables_of_a_pretrained_llm_are_trained_where_the_fusion_reads_the_image_token(
    tmp_path, fusion, reads
):
    """For its new row: gradients and moments are of the whole tables."""
    frozen = {"llm": policy("Frozen"), "vision": policy("Frozen")}
    nodes = model_node(fusion, adapter=frozen)
    build_model(nodes, VOCAB)[0].llm.save_pretrained(tmp_path)
    nodes["llm"] = {**nodes["llm"], "config": None, "pretrained": str(tmp_path)}
    planned, table = meta_model(nodes, 1), VOCAB * 32
    trained = [p for p in planned.part("llm").parameters.values() if p.requires_grad]
    assert [p.numel() for p in trained] == ([table, table] if reads else [])
    real = build_model(nodes, VOCAB, new_tokens={"<image>": 5} if reads else {})[0]
    assert planned.trained_count() == real.trained_count()
    assert optimizer_bytes(planned, AdamWCosine()) == optimizer_bytes(real, AdamWCosine())


def test_adamw_keeps_two_numbers_for_a_trained_one_and_muon_one_for_its_matrices():
    planned = meta_model(model_node("concat"), VOCAB)
    count = sum(p.numel() for p in planned.parameters())
    assert optimizer_bytes(planned, AdamWCosine()) == pytest.approx(8 * count, rel=0.01)
    ends = {
        id(planned.llm.get_input_embeddings().weight),
        id(planned.llm.get_output_embeddings().weight),
    }
    decayed = {
        id(p)
        for group in MuonCosine().groups(planned)
        if group["name"].endswith("_muon")
        for p in group["params"]
    }
    matrices = sum(p.numel() for p in planned.parameters() if id(p) in decayed)
    assert not decayed & ends
    assert matrices > count // 2
    assert optimizer_bytes(planned, MuonCosine()) == pytest.approx(
        8 * count - 4 * matrices, rel=0.01
    )


def test_bf16_true_halves_what_bf16_mixed_keeps_in_float32_with_copies():
    nodes = model_node("concat", llm=LLAMA)
    full, half = (
        meta_model(nodes, VOCAB),
        rank_model(meta_model(nodes, VOCAB), dtype=torch.bfloat16),
    )
    assert bytes_of(half.parameters()) * 2 == bytes_of(full.parameters())
    assert optimizer_bytes(half, AdamWCosine()) == pytest.approx(
        optimizer_bytes(full, AdamWCosine()) / 2, rel=0.01
    )
    assert Precision.of("bf16-mixed") == Precision(None, torch.bfloat16)
    assert Precision.of("bf16-true") == Precision(torch.bfloat16, None)
    assert Precision.of(32) == Precision.of(None) == Precision(None, None)
    with pytest.raises(ValueError, match="precision is 64-true"):
        Precision.of("64-true")


def test_autocast_on_meta_keeps_what_autocast_keeps():
    """Of the LLM alone: on a CPU autocast treats a backbone's LayerNorm otherwise than on a GPU."""
    nodes = model_node("concat", llm=LLAMA)
    real, planned = build_model(nodes, VOCAB)[0].train(), meta_model(nodes, VOCAB)
    ids = torch.arange(40).view(2, 20) % VOCAB
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0

    def loss(llm, ids, mask):
        return (
            llm(input_ids=ids, attention_mask=mask, use_cache=False)
            .logits.float()
            .logsumexp(-1)
            .sum()
        )

    def autocast_loss():
        with torch.autocast("cpu", torch.bfloat16):
            return loss(real.llm, ids, mask)

    truth = measure_step(real.llm, autocast_loss)
    reading = measure_step(
        planned.llm,
        lambda: loss(planned.llm, ids.to("meta"), mask.to("meta")),
        autocast=torch.bfloat16,
    )
    assert reading.saved == pytest.approx(truth.saved, rel=0.02)
    without = measure_step(planned.llm, lambda: loss(planned.llm, ids.to("meta"), mask.to("meta")))
    assert abs(without.saved - truth.saved) > 0.05 * truth.saved


@each(FUSIONS)
@pytest.mark.parametrize("llm", ["Full", "LoRA"])
@pytest.mark.fast_cases(1)
def test_tensor_ranks_hold_a_part_of_each_projection_and_run(node, llm):
    nodes = model_node(node, adapter={"llm": policy(llm), "fusion": policy(llm)})
    whole, part = meta_model(nodes, VOCAB), rank_model(meta_model(nodes, VOCAB), tensor=2)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    cut = {name for name, p in part.named_parameters() if p.shape != shapes[name]}
    for layer in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ):
        assert any(f"layers.0.{layer}" in name for name in cut)
    assert not any(
        word in name
        for name in cut
        for word in ("norm", "embed_tokens", "lm_head", "connector", "vision.body")
    )
    assert {p.requires_grad for p in part.parameters()} == {
        p.requires_grad for p in whole.parameters()
    }
    batch = meta_batch(part, rows=2, length=60, images=1)
    assert measure_batch(part, batch).saved < measure_batch(whole, batch).saved
    assert measure_batch(part, batch).forward < measure_batch(whole, batch).forward


def test_tensor_ranks_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(
        ValueError, match="num_key_value_heads of the LLM is 2, which 4 tensor ranks do not divide"
    ):
        rank_model(meta_model(model_node("concat"), VOCAB), tensor=4)


SHARDED = "owlfuse.parallel.strategies.Sharded"


@pytest.mark.parametrize(
    ("trainer", "gpus", "wanted"),
    [
        ({"devices": 1}, None, Layout(1, 1, False, 32)),
        (
            {"devices": 4, "num_nodes": 2, "strategy": "ddp"},
            None,
            Layout(8, 1, False, 4, buckets=True),
        ),
        (
            {"devices": [0, 1], "strategy": {"_target_": "owlfuse.parallel.strategies.Replicated"}},
            None,
            Layout(2, 1, False, 16),
        ),
        ({"devices": 1, "strategy": {"_target_": SHARDED}}, 8, Layout(8, 1, True, 4)),
        (
            {"devices": 1, "strategy": {"_target_": SHARDED, "data": "auto", "tensor": 4}},
            8,
            Layout(2, 4, True, 16),
        ),
        (
            {"devices": 1, "strategy": {"_target_": SHARDED, "data": 1, "tensor": "auto"}},
            4,
            Layout(1, 4, False, 32),
        ),
    ],
)
def test_ranks_come_from_the_strategy(trainer, gpus, wanted):
    assert configured_layout(trainer, {"global_batch_size": 32}, gpus) == wanted


@pytest.mark.parametrize(
    ("trainer", "gpus", "message"),
    [
        (
            {"devices": "auto"},
            None,
            "trainer.devices is 'auto': say for how many GPUs to plan, plan.gpus=8",
        ),
        (
            {"strategy": {"_target_": SHARDED, "data": 2, "tensor": 2}},
            8,
            "data 2 and tensor 2 ranks, whose product is not the 8",
        ),
        ({}, 3, "global_batch_size is 32, which 3 data ranks of micro_batch_size 10 do not divide"),
    ],
)
def test_a_layout_that_does_not_fit_the_gpus_is_refused(trainer, gpus, message):
    with pytest.raises(ConfigError, match=message):
        configured_layout(trainer, {"global_batch_size": 32}, gpus)


def plan_of(*overrides):
    return make_plan(compose(["experiment=shapes_owl1", "dry_run=true", *overrides]))


@pytest.mark.slow
def test_fsdp_divides_what_ddp_holds_whole_and_accumulation_keeps_gradients():
    plan = plan_of("plan.gpus=4", "data.micro_batch_size=2")
    fsdp = next(
        other
        for other in plan.alternatives
        if other.layout.sharded and not other.layout.checkpointing
    )
    assert plan.estimate.accumulation == 4
    assert (
        plan.estimate.peak
        >= plan.estimate.parameters
        + plan.estimate.gradients
        + plan.estimate.optimizer
        + plan.estimate.activations
    )
    # DDP has them in buckets too
    assert fsdp.gradients == pytest.approx(plan.estimate.gradients / 2 / 4, rel=0.01)
    assert fsdp.optimizer == pytest.approx(plan.estimate.optimizer / 4, rel=0.01)
    assert fsdp.parameters < plan.estimate.parameters / 2
    assert fsdp.gathered > 0 == plan.estimate.gathered
    single = estimate_of("plan.gpus=4")
    assert (
        single.peak < single.parameters + single.gradients + single.optimizer + single.activations
    )


def estimate_of(*overrides):
    """Of the layout that is asked for alone."""
    plain = OmegaConf.to_container(compose(["experiment=shapes_owl1", *overrides]), resolve=True)
    options = PlanOptions(**plain["plan"])
    return Workload(plain, options).estimate(
        configured_layout(plain["trainer"], plain["data"], options.gpus)
    )


def test_tensor_ranks_that_the_batch_does_not_fit_are_not_advised():
    layout = Layout(data=2, tensor=4, sharded=True, micro=4)
    advised = {(other.data, other.tensor) for other in alternative_layouts(layout, (), batch=8)}
    assert (1, 8) in advised
    assert (4, 2) not in advised
    advised = {(other.data, other.tensor) for other in alternative_layouts(layout, (), batch=16)}
    assert (4, 2) in advised


@pytest.mark.slow
def test_what_is_advised_is_what_the_parts_accept():
    """A backbone with batch norms cannot be with_checkpointing, a ViT can."""
    llm, vision, connector = (
        f"model.{part}.gradient_checkpointing=true" for part in ("llm", "vision", "connector")
    )
    vit = "model/vision=timm", "model.vision.name=test_vit", "model.vision.pretrained=false"
    for overrides, advised in (
        ((), (llm, connector)),
        (vit, (llm, vision, connector)),
        ((*vit, llm), (vision, connector)),
    ):
        nodes = OmegaConf.to_container(
            compose(["experiment=shapes_owl1", *overrides]), resolve=True
        )["model"]
        again = with_checkpointing(nodes, meta_model(nodes, VOCAB))
        assert checkpointing_keys(nodes, again) == advised
        meta_model(again, VOCAB)


@pytest.mark.slow
def test_tokens_flops_and_seconds_are_of_the_global_batch():
    common = "plan.length=100", "plan.images_per_sample=3", "data.max_length=512"
    plan = plan_of(*common)
    assert plan.text_tokens == 32 * (100 - 3 * 9)  # eight queries and an end token
    assert plan.visual_tokens == 32 * 3 * 9
    rate = plan.options.peak_tflops * 1e12 * plan.options.share_of_peak
    assert plan.estimate.seconds == pytest.approx(plan.estimate.flops / rate)
    twice = estimate_of(
        *common, "data.global_batch_size=64", "plan.gpus=2", "data.micro_batch_size=8"
    )
    assert twice.flops == pytest.approx(2 * plan.estimate.flops)
    assert twice.seconds == pytest.approx(plan.estimate.seconds)


@pytest.mark.slow
def test_a_dry_run_needs_no_data_makes_no_run_and_says_what_would_fit(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "experiment=shapes_owl3",
        "dry_run=true",
        "plan.gpu_memory=2",
        "plan.reserve=0.5",
        "data.max_length=1024",
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert (
        "It does not fit. The least change with which it does: data.micro_batch_size=1" in printed
    )
    assert all(
        word in printed
        for word in ("parameters", "optimizer state", "activations", "FLOPs", "visual tokens")
    )
    assert main([*command, "plan.gpu_memory=80"]) == 0
    assert "It fits." in capsys.readouterr().out
    with pytest.raises(ConfigError, match="dry_run: true trains nothing"):
        train.run(compose(["experiment=shapes_owl3", "dry_run=true"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.gpu=8", "plan.gpu: no such key; did you mean 'plan.gpus'?"),
        ("plan.gpu_memory=large", "plan.gpu_memory: 'large' is not a number"),
        (
            "plan.images_per_sample=100",
            "plan.images_per_sample: 100 images take 900 positions, and a sample has 512",
        ),
        ("trainer.precision=64-true", "precision is 64-true"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    override, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "experiment=shapes_owl1", "dry_run=true", override]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("owlfuse: error: ")
    assert message in error


SEVEN = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.mark.slow
def test_a_7b_model_is_planned_in_a_gigabyte_and_a_half(tmp_path):
    sizes = [f"model.llm.config.{key}={value}" for key, value in SEVEN.items()]
    words = [
        "experiment=shapes_owl1",
        "dry_run=true",
        "plan.gpus=8",
        "model.llm.config.num_key_value_heads=32",
        *sizes,
    ]
    words += [
        "trainer=gpu",
        "data.micro_batch_size=2",
        "model.llm.config.tie_word_embeddings=false",
    ]
    # not by getrusage, whose peak is also that of the process that started this one
    code = (
        "import sys; from owlfuse.__main__ import main; from owlfuse.training.cost import resident;"
        "code = main(['train', *sys.argv[1:]]); print('PEAK', resident('VmHWM')); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        cwd=tmp_path,
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "FSDP 8" in done.stdout
    assert "TP 8" in done.stdout
    assert 0 < int(done.stdout.rsplit("PEAK", 1)[1]) < 1.5 * GB


def test_what_is_read_grows_with_rows_in_proportion():
    planned = meta_model(model_node("concat", vision=VIT), VOCAB)
    one, two, three = (
        measure_batch(planned, meta_batch(planned, rows, 80, 1)) for rows in (1, 2, 3)
    )
    assert two.saved - one.saved == pytest.approx(three.saved - two.saved, rel=1e-4)
    assert two.forward - one.forward == three.forward - two.forward == one.forward
