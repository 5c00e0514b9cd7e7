"""A run leaves owlfuse: what transformers, peft and owlfuse make of the folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, pipeline

import owlfuse
from families import small_fields
from helpers import (
    CONNECTORS,
    FROZEN,
    ROWS,
    VIT,
    VOCAB,
    make_batch,
    make_model,
    model_node,
    perturb,
    policy,
)
from owlfuse.__main__ import main
from owlfuse.artifacts import load
from owlfuse.artifacts.export import export, model_card
from owlfuse.artifacts.hf.configuration import llm_node
from owlfuse.artifacts.init_from import adopt_parts
from owlfuse.artifacts.load import (
    TrainedModel,
    check_not_larger,
    load_base,
    load_exported,
    load_run,
    results_of_checkpoint,
)
from owlfuse.artifacts.run_data import run_tokenizer
from owlfuse.artifacts.runs import last_checkpoint
from owlfuse.artifacts.weights import read
from owlfuse.config.build import build
from owlfuse.config.compose import compose, read_run
from owlfuse.core.errors import ConfigError, DataError
from owlfuse.data.chat.tokenizer import prepare, use_template
from owlfuse.model.llm import load_llm, make_config
from owlfuse.model.multimodal import build_model, on_meta
from owlfuse.training import train
from small_tokenizers import byte_level

EXPERIMENTS = ("shapes_owl1", "shapes_owl2", "shapes_owl3")
LORA = (
    "model/adapter@model.adapter.llm=lora",
    "model/adapter@model.adapter.fusion=lora",
    "model.adapter.fusion.r=4",
)
QUESTION = "What color is the circle?"


def of_run(folder):
    """A question about a picture as the run's own data encode it, and its logits by the run's
    model."""
    trained = load_run(folder)
    model = trained.model
    config = compose([f"resume={folder}"])
    data = build(config.data)
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    loader = data.validation_loader("val", 2, batch_size=2)
    batch = next(iter(loader))
    with torch.no_grad():
        return model, batch, model(batch)


def exported(train_run, name, out, *options, overrides=()):
    run = train_run(name, f"experiment={name.partition('-')[0]}", *overrides)
    assert main(["export", str(run), str(out), *options]) == 0
    return run


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.fast_cases(1)
def test_logits_are_identical_after_export_by_every_way_of_loading(experiment, train_run, tmp_path):
    out = tmp_path / "out"
    _, batch, expected = of_run(exported(train_run, experiment, out))
    with torch.no_grad():
        assert torch.equal(owlfuse.load(out)(batch), expected)
        auto = AutoModelForImageTextToText.from_pretrained(out).eval()
        logits = auto(batch.input_ids, batch.attention_mask, batch.pixel_values).logits
    assert torch.equal(logits, expected)
    files = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "README.md",
    } <= files
    assert {"processor_config.json", "chat_template.jinja"} <= files
    assert "val/exact_match" in (out / "README.md").read_text()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.fast_cases(1)
def test_the_processor_makes_what_the_training_data_have(experiment, train_run, tmp_path):
    out = tmp_path / "out"
    run = exported(train_run, experiment, out)
    config = compose([f"resume={run}"])
    data = build(config.data)
    model = load_run(run).model
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    source = data.validation["val"]
    from owlfuse.evaluation.questions import question_samples

    sample = question_samples(source[0])[0][0]
    picture = Image.open(source.image_root / sample.images[0])
    question = sample.messages[0]["content"][-1]["text"].lstrip("\n")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    processor = AutoProcessor.from_pretrained(out)
    options = {
        "tokenize": True,
        "add_generation_prompt": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    for tile, views in ((0.0, 1), (1.0, 5)):  # shapes are square: two rows of two tiles
        source.tile = processor.tile = tile
        expected = data.prompts([(sample, source)])
        got = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        assert torch.equal(got["input_ids"], expected.input_ids)
        assert torch.equal(got["pixel_values"], expected.pixel_values)
        assert len(got["pixel_values"]) == views
    processor.save_pretrained(tmp_path / "tiled")
    assert AutoProcessor.from_pretrained(tmp_path / "tiled").tile


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.fast_cases(1)
def test_transformers_pipeline_answers_as_the_model_does(experiment, train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, experiment, out)
    picture = Image.new("RGB", (90, 60), "red")
    picture.save(tmp_path / "a.png")
    answer = pipeline("image-text-to-text", model=str(out))
    got = []
    for shown in ({"image": picture}, {"path": str(tmp_path / "a.png")}):
        chat = [
            {
                "role": "user",
                "content": [{"type": "image", **shown}, {"type": "text", "text": QUESTION}],
            }
        ]
        got += answer(text=chat, return_full_text=False, max_new_tokens=5, do_sample=False)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out),
        AutoProcessor.from_pretrained(out),
    )
    inputs = processor(images=picture, text=f"<|user|><image>\n{QUESTION}<|assistant|>")
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert [one["generated_text"] for one in got] == [
        processor.decode(ids, skip_special_tokens=True)
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "registering",
    [
        "import owlfuse.artifacts.hf\nimport transformers",
        "import transformers\nimport owlfuse.artifacts.hf",
        "import owlfuse\nowlfuse.load({out!r})",
    ],
    ids=["first", "second", "load"],
)
def test_a_fresh_process_reads_it_after_an_import_that_registers(registering, train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl3", out)
    code = (
        f"{registering.format(out=str(out))}\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, AutoConfig\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(out)!r})\n"
        "print(type(model).__name__, "
        f"type(AutoProcessor.from_pretrained({str(out)!r})).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["OwlfuseForConditionalGeneration", "OwlfuseProcessor"], (
        done.stderr
    )


@pytest.mark.slow
def test_importing_owlfuse_alone_registers_nothing_and_imports_no_library():
    code = (
        "import sys\nbefore = list(sys.meta_path)\nimport owlfuse\n"
        "print(sys.meta_path == before, 'torch' in sys.modules, 'transformers' in sys.modules)\n"
        "from transformers import CONFIG_MAPPING\nprint('owlfuse' in CONFIG_MAPPING)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["shapes_owl2", "shapes_owl3"])
def test_lora_is_written_in_pefts_format_and_loads_onto_the_base(experiment, train_run, tmp_path):
    out, merged = tmp_path / "out", tmp_path / "merged"
    run = exported(train_run, f"{experiment}-lora", out, overrides=LORA)
    assert main(["export", str(run), str(merged), "merge=true"]) == 0
    model, batch, expected = of_run(run)
    assert any(
        ".lora_B" in name and value.abs().max() > 0 for name, value in model.named_parameters()
    )
    inputs = (batch.input_ids, batch.attention_mask, batch.pixel_values)
    base = AutoModelForImageTextToText.from_pretrained(out).eval()
    with torch.no_grad():
        assert not torch.allclose(base(*inputs).logits, expected)
        assert torch.equal(owlfuse.load(out)(batch), expected)
        assert torch.equal(
            PeftModel.from_pretrained(base, out / "adapter").eval()(*inputs).logits, expected
        )
        torch.testing.assert_close(owlfuse.load(merged)(batch), expected, rtol=1e-4, atol=1e-5)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {4, 8}
    assert not (merged / "adapter").exists()
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118


def test_what_an_llm_from_elsewhere_has_in_its_configuration_does_not_keep_it_from_loading(
    train_run, tmp_path
):
    """As one that was read from a GGUF file: how it was quantised, and a token that its class
    does not know."""
    trained = load_run(train_run("shapes_owl1", "experiment=shapes_owl1"))
    trained.model.llm.config.quantization_config = {"quant_method": "gguf"}
    trained.model.llm.config.unk_token_id = 0
    export(trained, tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert owlfuse.load(tmp_path / "out").llm.config.hidden_size == 128


def test_code_that_the_hubs_files_name_is_not_in_an_export(tmp_path):
    """As of Phi-3 or DeepSeek: transformers has the classes itself, and keeps the key."""
    tokenizer = prepare(use_template(byte_level(), "chatml"))
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["a.A", "a.B"]}
    model = make_model()
    model.llm.config.auto_map = {"AutoConfig": "configuration_a.A"}
    out = export(TrainedModel(model, tokenizer, None), tmp_path / "out")
    assert not [file for file in out.glob("*.json") if "auto_map" in file.read_text()]
    load_exported(out)


@pytest.mark.parametrize(
    ("evaluated", "which", "step", "shown"),
    [
        ({"steps": 20, "checkpoint": "last"}, "last", 20, True),
        ({"steps": 20, "checkpoint": "step_00000020.ckpt"}, "last", 20, True),
        ({"steps": 20}, "last", 20, True),  # of before the checkpoint was named
        ({"steps": 12, "checkpoint": "best.ckpt"}, "best", 12, True),
        ({"steps": 20, "checkpoint": "last"}, "best", 12, False),
        ({"steps": 12, "checkpoint": "best.ckpt"}, "last", 20, False),
        ({"steps": 20, "checkpoint": "last"}, "last", 24, False),  # it went on
    ],
)
def test_the_model_card_has_the_results_of_its_own_weights(evaluated, which, step, shown, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(evaluated))
    found = results_of_checkpoint(tmp_path, which == "best", step)
    assert found == (evaluated if shown else None)


@pytest.mark.slow
def test_large_weights_are_sharded(train_run, tmp_path):
    out = tmp_path / "out"
    run = exported(train_run, "shapes_owl1", out, "max_shard_size=1MB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").exists()
    _, batch, expected = of_run(run)
    with torch.no_grad():
        assert torch.equal(owlfuse.load(out)(batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes_owl1", "shapes_owl3-lora"])
def test_a_run_starts_from_an_export(name, train_run, tmp_path, work):
    out = tmp_path / "out"
    run = exported(train_run, name, out, overrides=LORA if name.endswith("lora") else ())
    experiment = name.partition("-")[0]
    started = train_run(
        f"{experiment}-from-{name}",
        f"init_from={out}",
        "trainer.max_steps=1",
        "optim.warmup_steps=1",
    )
    config = compose([f"resume={started}"])
    assert config.model.fusion["_target_"] == compose([f"resume={run}"]).model.fusion["_target_"]
    weights = dict(load_run(started).model.named_parameters())
    base = load_exported(out, merge=True)[0].model
    assert all(torch.equal(weights[own], value) for own, value in base.named_parameters())


def test_a_run_from_an_export_may_say_how_its_parts_compute(train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    asked = ["model.connector.gradient_checkpointing=true", "model.llm.gradient_checkpointing=true"]
    asked.append("model.vision.chunk=4")
    config = compose(["experiment=shapes_owl1", f"init_from={out}", *asked])
    adopt_parts(config)
    nodes = OmegaConf.to_container(config.model, resolve=True)
    model, _ = build_model(nodes, 1, load_base(str(out), nodes, 1))
    assert model.connector.gradient_checkpointing
    assert model.llm.is_gradient_checkpointing
    assert model.vision.chunk == 4
    nodes["connector"]["gradient_checkpointing"] = False
    assert not build_model(nodes, 1, model)[0].connector.gradient_checkpointing


def test_a_run_from_an_export_may_hold_its_llm_in_4_bits(train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    quantization = "model.llm.quantization={compute_dtype: float32}"
    config = compose(["experiment=shapes_owl1", f"init_from={out}", quantization])
    adopt_parts(config)
    assert config.model.llm.quantization.compute_dtype == "float32"


@pytest.mark.slow
def test_init_from_refuses_parts_that_are_not_the_folders(train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    for override, message in {
        "model/fusion=modality_adaptive": (
            "has model.fusion with _target_ .*Concat, and .*ModalityAdaptive is asked for"
        ),
        "model.vision.positions=false": (
            "has model.vision with positions True, and False is asked for"
        ),
        "model.llm.config.hidden_size=64": (
            "has model.llm with hidden_size 128, and 64 is asked for"
        ),
        "model.llm.pretrained=some/llm": (
            "has model.llm with pretrained None, and some/llm is asked for"
        ),
    }.items():
        with pytest.raises(ConfigError, match=message):
            train.run(compose([f"init_from={out}", override]))
    with pytest.raises(ConfigError, match="has no config.json"):
        train.run(compose([f"init_from={tmp_path / 'nowhere'}"]))


@pytest.fixture(scope="module")
def concat_out(tmp_path_factory):
    """An export with a connector and a fusion that are not the default ones."""
    model = make_model("concat", connector=CONNECTORS["abstractor"])
    return export(TrainedModel(model, None, None), tmp_path_factory.mktemp("concat") / "out")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("experiment=shapes_owl3", "Abstractor, and .*LinearConnector is asked for"),
        ("model/fusion=hyperattention", "Concat, and .*HyperAttention is asked for"),
        ("model.fusion.gate=adaptive", "Concat, and .*HyperAttention is asked for"),
        ("model/vision=convnet", "with name vit_tiny_patch16_224, and resnet10t is asked for"),
        ("model.llm.config.num_hidden_layers=4", "with num_hidden_layers 3, and 4 is asked for"),
    ],
)
@pytest.mark.fast_cases(2)
def test_a_part_that_is_asked_for_is_not_replaced_though_it_is_the_default(
    asked, message, concat_out
):
    with pytest.raises(ConfigError, match=message):
        adopt_parts(compose([f"init_from={concat_out}", asked]))


def test_parts_that_nobody_asks_for_are_the_folders(concat_out):
    config = compose([f"init_from={concat_out}", "model.vision.image_size=64", "optim=muon"])
    adopt_parts(config)
    assert config.model.fusion._target_.endswith("Concat")
    assert config.model.connector._target_.endswith("Abstractor")
    assert (config.model.vision.name, config.model.vision.image_size) == (VIT["name"], 64)


@pytest.mark.parametrize(
    ("asked", "size"),
    [([], 32), (["model.vision.image_size=64"], 64), (["model.vision.image_size=96"], 96)],
)
@pytest.mark.fast_cases(1)
def test_init_from_takes_the_folders_size_of_pictures_unless_another_is_asked_for(
    asked, size, train_run, tmp_path
):
    """Asked for is what is not the group's own yaml's, 64 included."""
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    config = compose([f"init_from={out}", *asked])
    adopt_parts(config)
    assert config.model.vision.image_size == size
    model = load_base(str(out), OmegaConf.to_container(config.model), vocab_size=8)
    assert model.vision.preprocessing.size == (size, size)
    assert model.vision.grid == on_meta(OmegaConf.to_container(config.model), 8)[0].vision.grid


def test_an_existing_folder_is_kept_and_a_failed_export_leaves_none(
    train_run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    run = exported(train_run, "shapes_owl1", out)
    before = sorted(path.name for path in out.iterdir())
    assert main(["export", str(run), str(out)]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == before

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("owlfuse.artifacts.export.model_card", fail)
    with pytest.raises(OSError, match="no space"):
        main(["export", str(run), str(tmp_path / "other")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("cut", ["truncated", "no config", "other model", "not json"])
def test_a_damaged_folder_is_told_in_one_line(cut, train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    weights, config = out / "model.safetensors", out / "config.json"
    if cut == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif cut == "no config":
        config.unlink()
    elif cut == "other model":
        config.write_text('{"model_type": "llama"}')
    else:
        config.write_text("{")
    wanted = {"truncated": "model.safetensors", "no config": "no config.json"}.get(
        cut, "config.json"
    )
    with pytest.raises(DataError, match=wanted) as caught:
        owlfuse.load(out)
    assert "\n" not in str(caught.value)


def changed(weights, change):
    """Rewrites a safetensors file."""
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.connector.proj.weight"),
            r"model.connector.proj.weight \(missing\)",
        ),
        (lambda t: t.update(extra=torch.ones(2)), r"extra \(unexpected\)"),
        (
            lambda t: t.update({"model.connector.proj.bias": torch.ones(3)}),
            r"proj.bias \(3,\), expected \(128,\) \(",
        ),
        (
            lambda t: t.update({"model.connector.proj.bias": torch.ones(128, dtype=torch.int32)}),
            "proj.bias is I32",
        ),
    ],
    ids=["missing", "left over", "wrong shape", "wrong type"],
)
def test_weights_that_do_not_fit_are_listed(change, message, train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    changed(out / "model.safetensors", change)
    with pytest.raises(DataError, match=message) as caught:
        owlfuse.load(out)
    assert "\n" not in str(caught.value)


def test_a_processor_whose_tokenizer_lost_the_placeholder_says_so(train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    for file in (out / "tokenizer.json", out / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<image>", "<elsewhere>"))
    with pytest.raises(DataError, match="the tokenizer has no <image>"):
        AutoProcessor.from_pretrained(out)


@pytest.mark.parametrize(
    "target", ["os.system", "owlfuse.data.shapes.write.write_shapes", "subprocess.Popen"]
)
def test_a_config_may_not_name_what_is_no_part_of_a_model(target, train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    config = json.loads((out / "config.json").read_text())
    config["connector"]["_target_"] = target
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="connector"):
        owlfuse.load(out)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_llm_in_16_bits_beside_parts_in_32_stays_so(dtype, tmp_path):
    model = make_model("hyperattention-adaptive", dtype=dtype)
    batch = make_batch(ROWS)
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    loaded = load_exported(out)[0].model
    assert {p.dtype for p in loaded.llm.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in loaded.vision.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))


def test_init_from_gives_the_llm_the_type_that_is_asked_for(tmp_path):
    out = export(TrainedModel(make_model("hyperattention-adaptive"), None, None), tmp_path / "out")
    for device in ("cpu", "meta"):
        with torch.device(device):
            for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
                node = model_node("hyperattention-adaptive", dtype=dtype)
                model = load_base(str(out), node, VOCAB)
                assert {p.dtype for p in model.llm.parameters()} == {expected}
                assert {p.dtype for p in model.connector.parameters()} == {torch.float32}


def test_init_from_folds_updates_into_weights_of_16_bits_without_rounding(tmp_path):
    model = make_model(adapter={**FROZEN, "llm": policy("LoRA", r=2)}, dtype="bfloat16")
    perturb(p for name, p in model.named_parameters() if "lora_B" in name)
    layer = model.llm.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    merged = load_base(str(out), model_node(), VOCAB).llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


def test_an_llm_inside_of_a_multimodal_configuration_comes_back(tmp_path):
    """As Gemma 3's of the hub, whose size of the vocabulary is one level deeper."""
    fields = small_fields("gemma3")
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields["vision_config"] = {
        **vision,
        "intermediate_size": 32,
        "model_type": "siglip_vision_model",
    }
    fields["text_config"]["vocab_size"] = VOCAB
    load_llm(VOCAB, config=fields).save_pretrained(tmp_path / "llm")
    saved = json.loads((tmp_path / "llm/config.json").read_text())
    saved.pop("vocab_size", None)
    (tmp_path / "llm/config.json").write_text(json.dumps(saved))
    model = make_model(pretrained=str(tmp_path / "llm"))
    batch = make_batch(ROWS)
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load_exported(out)[0].model(batch), model(batch))


@pytest.mark.parametrize(
    ("family", "others"),
    [
        ("gemma3", {"text_config": {"sliding_window_pattern": 6}}),
        ("gemma3n", {"text_config": {"altup_lr_multiplier": 1.0}}),
        ("gemma4", {}),
    ],
)
def test_keys_that_a_file_of_the_hub_has_beside_its_classes_own_are_left_out(family, others):
    config = CONFIG_MAPPING[family](**small_fields(family))
    values = json.loads(config.to_json_string())
    for name, keys in others.items():
        values[name] |= keys
    saved = json.loads(json.dumps(llm_node(CONFIG_MAPPING[family].from_dict(values))))
    again = make_config(saved["config"], VOCAB)
    assert again.to_dict()["text_config"].keys() >= saved["config"]["text_config"].keys()


def test_an_adapter_that_lacks_an_update_or_has_one_too_many_is_refused(tmp_path):
    model = make_model(adapter={**FROZEN, "llm": policy("LoRA", r=2)})
    out = export(TrainedModel(model, None, None), tmp_path / "out")
    load_exported(out)
    file = out / "adapter/adapter_model.safetensors"
    updates = load_file(file)
    name = min(name for name in updates if "lora_B" in name)
    for wrong, problem in (
        ({key: value for key, value in updates.items() if key != name}, "missing"),
        ({**updates, f"{name}.more": torch.zeros(1)}, "unexpected"),
    ):
        save_file(wrong, file)
        with pytest.raises(DataError, match=rf"adapter_model.safetensors: .*{name}.*{problem}"):
            load_exported(out)


def test_how_answers_end_is_known_to_the_next_run(train_run, tmp_path):
    out = tmp_path / "out"
    exported(train_run, "shapes_owl1", out)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert load_base(str(out), model_node(), 1).llm.generation_config.eos_token_id == ends
    again = tmp_path / "again"
    model, processor = load_exported(out)
    export(TrainedModel(model.model, processor.tokenizer, None), again)
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == ends


def test_a_merged_export_of_an_llm_in_16_bits_has_the_updates_in_32(tmp_path):
    model = make_model(adapter={**FROZEN, "llm": policy("LoRA", r=2)}, dtype="bfloat16")
    perturb(p for name, p in model.named_parameters() if "lora_B" in name)
    layer = model.llm.model.layers[0].self_attn.q_proj
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    out = export(TrainedModel(model, None, None), tmp_path / "out", merge=True)
    merged = load_exported(out)[0].model.llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("results", [{}, {"metrics": None}, {"metrics": {"a": "x", "b": 0.5}}])
def test_a_model_card_has_the_metrics_that_are_numbers(results, train_run):
    model = load_run(train_run("shapes_owl1", "experiment=shapes_owl1")).model
    card = model_card(model, {"steps": 3, **results}, "a run", False, False)
    assert (
        ("| b | 0.5 |" in card) == ("Results after 3 steps" in card) == bool(results.get("metrics"))
    )
    assert "| a |" not in card
    assert "generate_kwargs" not in card
    assert "generate_kwargs=options" in model_card(model, None, "a run", False, True)


@pytest.mark.parametrize(
    ("key", "value"), [("model.vision.resize", "crop"), ("model.fusion.gate", "static")]
)
@pytest.mark.fast_cases(1)
def test_a_key_of_the_model_that_was_edited_after_the_training_is_told(
    key, value, train_run, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(train_run("shapes_owl3", "experiment=shapes_owl3"), folder)
    load_run(folder)
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    with pytest.raises(DataError, match=f"config.yaml: {key} is {value}, and step_.* was trained"):
        load_run(folder)


def test_a_configuration_whose_model_is_far_larger_than_the_checkpoint_is_told(train_run):
    folder = train_run("shapes_owl3", "experiment=shapes_owl3")
    config, weights = read_run(folder), read(last_checkpoint(folder))[0]
    vocab_size = len(run_tokenizer(folder, config["data"]))
    check_not_larger(config["model"], vocab_size, weights, folder)
    config["model"]["llm"]["config"]["intermediate_size"] = 400_000
    with pytest.raises(DataError, match="its model has .* numbers where the checkpoint has"):
        check_not_larger(config["model"], vocab_size, weights, folder)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (10**6, "its model computes tables of .* numbers that its weights do not have"),
        # fusions are tried on a small copy, which has a table as long
        (10**9, "fusion: .* its copy would have .* numbers"),
    ],
)
@pytest.mark.fast_cases(1)
def test_tables_that_no_weights_hold_have_a_limit(tmp_path, monkeypatch, positions, message):
    monkeypatch.setattr(load, "MAX_UNSAVED", 10**5)
    model, _ = build_model(model_node("concat", llm=small_fields("gptj")), VOCAB)
    export(TrainedModel(model, None, None), tmp_path / "out")
    load_exported(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["text_config"]["n_positions"] = positions
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        load_exported(tmp_path / "out")
