"""Runs whose weights have half of float32's bits train, evaluate, go on and are exported."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors import safe_open

from families import small_fields
from helpers import SHAPE_COUNTS, SMALL_RUN, llm_fields, make_batch, make_model
from owlfuse.artifacts.export import export
from owlfuse.artifacts.load import TrainedModel, load_exported, load_run
from owlfuse.artifacts.runs import last_checkpoint
from owlfuse.artifacts.weights import HALVES, check_trained_precision, set_precision
from owlfuse.config.compose import compose
from owlfuse.core.errors import ConfigError
from owlfuse.data.shapes.write import write_shapes
from owlfuse.parallel.strategies import Sharded, check_strategy
from owlfuse.training import train
from owlfuse.training.trainer import make_trainer

SMALL = [
    *SMALL_RUN,
    "evaluation.max_questions=4",
    "evaluation.max_new_tokens=3",
    "evaluation.contact_sheet=4",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", **SHAPE_COUNTS)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        ("shapes_owl1", []),
        ("shapes_owl2", ["optim=muon"]),
        ("shapes_owl3", ["model/adapter@model.adapter.llm=lora", "data.micro_batch_size=4"]),
    ],
)
def test_a_run_of_half_precision_trains_evaluates_goes_on_and_is_exported(
    work, precision, experiment, overrides
):
    common = [
        *SMALL,
        *overrides,
        f"trainer.precision={precision}",
        "name=half",
        f"experiment={experiment}",
    ]
    folder = train.run(compose(common))
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    losses = [value for name, value in metrics.items() if name.endswith("/loss")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    trained = load_run(folder)
    dtype = HALVES.get(precision, torch.float32)
    assert {parameter.dtype for parameter in trained.model.parameters()} == {dtype}
    batch = make_batch([[5, 6, "image", 7, 8]], trained.model.fusion.tokens_per_image)
    with torch.no_grad():
        expected = trained.model(batch)
    out = export(trained, work / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert stored - {"I64"} == {
        {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    }
    loaded = load_exported(out)[0].model
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), expected, rtol=0, atol=0)
    resumed = compose([f"resume={folder}", "trainer.max_steps=8"])
    assert train.run(resumed) == folder


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_rotary_frequencies_keep_their_precision_in_any_cast(dtype, family):
    extra = (
        {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
        if family == "gemma3_text"
        else {}
    )
    model = make_model("concat", llm=llm_fields(family, **extra))
    before = {
        name: buffer.clone() for name, buffer in model.llm.named_buffers() if "inv_freq" in name
    }
    precision = next(name for name, value in HALVES.items() if value == dtype)
    set_precision(model, precision)
    after = dict(model.llm.named_buffers())
    assert before
    assert all(
        torch.equal(after[name], value) and after[name].dtype == torch.float32
        for name, value in before.items()
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = make_batch([[5, 6, "image", 7, 8]], model.fusion.tokens_per_image)
    assert model(batch).dtype == dtype


def test_rotary_frequencies_of_a_backbone_keep_their_precision_too():
    model = make_model("concat")
    frequencies = torch.rand(8)
    model.vision.body.register_buffer("rope_inv_freq", frequencies.clone(), persistent=False)
    model.to(torch.bfloat16)
    assert torch.equal(model.vision.body.rope_inv_freq, frequencies)
    assert {parameter.dtype for parameter in model.vision.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "overrides",
    [
        ["model/adapter@model.adapter.llm=full"],
        ["model/adapter@model.adapter.llm=last_n", "model.adapter.llm.n=1"],
        ["model/adapter@model.adapter.llm=lora", "model.adapter.llm.modules_to_save=[norm]"],
        # whose own weights are of the LLM's type
        ["model/adapter@model.adapter.llm=lora", "model/fusion=hyperattention"],
    ],
    ids=["full", "last_n", "modules_to_save", "fusion"],
)
@pytest.mark.fast_cases(1)
def test_16_bit_weights_are_trained_in_runs_of_16_bits_alone(work, overrides):
    common = [*SMALL, "experiment=shapes_owl1", "+model.llm.dtype=bfloat16", *overrides]
    with pytest.raises(ConfigError, match="would be trained in 16 bits, in which small steps"):
        train.run(compose(common))


def test_who_may_train_beside_an_llm_of_16_bits():
    model = make_model("concat", llm={**llm_fields("llama")})
    for parameter in model.llm.parameters():
        parameter.data = parameter.data.bfloat16()
        parameter.requires_grad_(False)
    check_trained_precision(model, "bf16-mixed", {})
    with pytest.raises(ValueError, match="embed_tokens"):
        check_trained_precision(model, "bf16-mixed", {"<new>": 7})
    check_trained_precision(model, "bf16-true", {"<new>": 7})


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_gradients_of_16_mixed_are_clipped_at_their_own_size(work, optim, monkeypatch):
    """With the loss multiplied by a scale, as on GPUs; Lightning does it on no CPU by itself."""

    def on_cpu(*args):
        trainer = make_trainer(*args)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    norms = {}
    common = [*SMALL, "experiment=shapes_owl3", f"optim={optim}", "trainer.log_every_n_steps=1"]
    for name in ("plain", "scaled"):
        run = train.run(compose([*common, "trainer.max_steps=2", f"name={name}"]))
        with (run / "metrics.csv").open() as file:
            rows = [row["train/grad_norm"] for row in csv.DictReader(file)]
        norms[name] = [float(norm) for norm in rows if norm]
        monkeypatch.setattr(train, "make_trainer", on_cpu)
    assert norms["scaled"] == pytest.approx(norms["plain"], rel=0.05)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.slow
def test_updates_that_the_scaler_of_16_mixed_leaves_out_are_counted_and_told(
    work, monkeypatch, capsys
):
    def with_large_scale(*args):
        trainer = make_trainer(*args)
        scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
        trainer.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return trainer

    monkeypatch.setattr(train, "make_trainer", with_large_scale)
    words = [*SMALL, "experiment=shapes_owl3", "trainer.log_every_n_steps=1"]
    run = train.run(compose([*words, "trainer.max_steps=2"]))
    with (run / "metrics.csv").open() as file:
        counts = [row["train/skipped_updates"] for row in csv.DictReader(file)]
    assert [float(count) for count in counts if count] == [1, 2]
    assert "2 of these steps changed no weight" in capsys.readouterr().err


def test_weights_that_transformers_keeps_in_32_bits_keep_them(tmp_path, monkeypatch):
    """Those that choose a token's experts, private to transformers' `_keep_in_fp32_modules_strict`:
    rounded, they would choose others."""
    model = make_model("concat", llm=small_fields("deepseek_v3"))
    router = model.llm.model.layers[-1].mlp.gate
    before = router.weight.detach().clone()
    set_precision(model, "bf16-true")
    assert torch.equal(router.weight, before)
    assert router.weight.dtype == torch.float32
    assert router.e_score_correction_bias.dtype == torch.float32
    assert model.llm.model.layers[-1].self_attn.o_proj.weight.dtype == torch.bfloat16
    batch = make_batch([[5, 6, "image", 7, 8]], model.fusion.tokens_per_image)
    with torch.no_grad():
        expected = model(batch)
        assert expected.dtype == torch.bfloat16
        out = export(TrainedModel(model, None, None), tmp_path / "out")
        assert torch.equal(load_exported(out)[0].model(batch), expected)
    strategy = Sharded()
    monkeypatch.setattr(strategy, "sizes", lambda: (2, 1))
    trainer = SimpleNamespace(precision="bf16-true", strategy=strategy)
    with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM transformers keeps .* bf16-mixed"):
        check_strategy(trainer, model, None)


def test_16_mixed_is_refused_with_tensor_ranks_which_do_not_tell_each_other(monkeypatch):
    strategy = Sharded()
    model = make_model("concat", llm=llm_fields("llama"))
    trainer = SimpleNamespace(precision="16-mixed", strategy=strategy)
    monkeypatch.setattr(strategy, "sizes", lambda: (2, 1))
    check_strategy(trainer, model, None)
    monkeypatch.setattr(strategy, "sizes", lambda: (1, 2))
    with pytest.raises(ValueError, match="trainer.precision: tensor ranks do not tell each other"):
        check_strategy(trainer, model, None)


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_precision_of_the_machine_says_so(work, caplog):
    """`precision: null` is decided by the machine, and no key changes."""
    words = [*SMALL, "experiment=shapes_owl3", "name=first", "trainer.precision=null"]
    folder = train.run(compose(words))
    assert json.loads((folder / "results.json").read_text())["precision"] == "32-true"
    checkpoint = last_checkpoint(folder)
    content = torch.load(checkpoint, weights_only=True)
    content["run"]["precision"] = "bf16-mixed"
    torch.save(content, checkpoint)
    train.run(compose([f"resume={folder}", "trainer.max_steps=8"]))
    assert "the run had bf16-mixed until step 6, and has 32-true on this machine" in caplog.text
    results = json.loads((folder / "results.json").read_text())
    changed = {key: values for row in results["changes"] for key, values in row["changes"].items()}
    assert changed["trainer.precision"] == ["bf16-mixed", "32-true"]
