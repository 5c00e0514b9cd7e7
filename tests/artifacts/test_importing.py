"""Released checkpoints in owlfuse's own format, and back, by the commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import owlfuse
from family_templates import family_tokenizer
from owlfuse.__main__ import main
from owlfuse.artifacts.importing import writes_an_end
from owlfuse.core.terminal import visible
from owlfuse.core.types import IMAGE
from released_inputs import reference_logits, reference_loss

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = ("owl1", "owl2", "owl3_adaptive", "owl3_static", "owl3_fused")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_tokenizer(folder, vocabulary=320, image=None, template=None):
    """A byte-level tokenizer; `image` is its token 5, which the goldens of owl3 have for an
    image."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_end|>", image or "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [f"word{k} number{k * k}" for k in range(400)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(words, trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, **tokens
    ).save_pretrained(folder)


def folder_with_tokenizer(family, tmp_path, **options):
    folder = tmp_path / family
    shutil.copytree(GOLDENS / family, folder)
    owl3 = {"image": "<|image|>", "template": CHATML} if family.startswith("owl3") else {}
    write_tokenizer(folder, **{**owl3, **options})
    return folder


def imported(folder, out):
    assert main(["import", str(folder), str(out)]) == 0
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(2)
def test_the_import_agrees_with_the_released_code_and_goes_back_to_the_same_bytes(family, tmp_path):
    out = imported(GOLDENS / family, tmp_path / "out")
    io = load_file(GOLDENS / family / "io.safetensors")
    model = owlfuse.load(out)
    with torch.no_grad():
        torch.testing.assert_close(
            reference_logits(model, io)[io["valid"]], io["logits"][io["valid"]], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(reference_loss(model, io), io["loss"][0], rtol=0, atol=1e-5)

    assert main(["export", str(out), str(tmp_path / "back"), "layout=released"]) == 0
    assert (tmp_path / "back/config.json").read_bytes() == (
        GOLDENS / family / "config.json"
    ).read_bytes()
    before = load_file(GOLDENS / family / "model.safetensors")
    after = load_file(tmp_path / "back/model.safetensors")
    assert set(before) == set(after)
    assert all(
        before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
        for name in before
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(1)
def test_with_a_tokenizer_it_chats_and_transformers_reads_it(family, tmp_path, capsys):
    out = imported(folder_with_tokenizer(family, tmp_path), tmp_path / "out")
    Image.new("RGB", (80, 60), "green").save(tmp_path / "a.png")
    capsys.readouterr()
    assert (
        main(
            [
                "chat",
                str(out),
                "--image",
                str(tmp_path / "a.png"),
                "What is it?",
                "--max-new-tokens",
                "6",
            ]
        )
        == 0
    )
    answer = capsys.readouterr().out
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(out),
        AutoProcessor.from_pretrained(out),
    )
    content = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "What is it?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=6)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert visible(processor.decode(ids, skip_special_tokens=True)) + "\n" == answer


SYSTEM = (
    "<s>The following is a conversation between a curious human and AI assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("owl1", SYSTEM + "\nHuman: <image>\nHuman: What?\nAI: A cat.</s>\nHuman: Why?\nAI: "),
        ("owl2", "<s>USER: <image>What? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"),
        (
            "owl3_static",
            "<|im_start|>user\n<|image|>\nWhat?<|im_end|>\n<|im_start|>assistant\nA "
            "cat.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_prompt_is_the_released_familys(family, prompt, tmp_path):
    out = imported(folder_with_tokenizer(family, tmp_path), tmp_path / "out")
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    assert (
        AutoProcessor.from_pretrained(out).apply_chat_template(chat, add_generation_prompt=True)
        == prompt
    )


def test_the_image_token_may_lie_behind_the_embeddings_where_its_own_is_not_used(tmp_path):
    """Llama's tokenizers are as large as its embeddings, and an `<image>` comes on top."""
    out = imported(folder_with_tokenizer("owl1", tmp_path, vocabulary=320), tmp_path / "out")
    processor, model = (
        AutoProcessor.from_pretrained(out),
        AutoModelForImageTextToText.from_pretrained(out),
    )
    assert model.config.image_token_id == 320 == model.get_input_embeddings().num_embeddings
    inputs = processor(images=Image.new("RGB", (20, 20)), text="<s><image>What?")
    assert torch.isfinite(model(**inputs).logits).all()
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.slow
def test_a_run_may_start_from_an_import(tmp_path, train_run):
    folder = folder_with_tokenizer("owl3_static", tmp_path)
    out = imported(folder, tmp_path / "out")
    started = train_run(
        "from-import",
        f"init_from={out}",
        "trainer.max_steps=1",
        "optim.warmup_steps=1",
        "~model.vision.image_size",
    )
    assert json.loads((started / "results.json").read_text())["steps"] == 1


@pytest.mark.parametrize("fault", ["no image token", "no template", "not a tokenizer"])
def test_a_tokenizer_that_does_not_fit_is_told_in_one_line_and_nothing_is_left(
    fault, tmp_path, capsys
):
    options = {"no image token": {"template": CHATML}, "no template": {"template": None}}.get(
        fault, {}
    )
    folder = folder_with_tokenizer("owl3_static", tmp_path, **options)
    if fault == "no image token":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 319}))
        write_tokenizer(folder, vocabulary=300, template=CHATML)
    if fault == "not a tokenizer":
        (folder / "tokenizer.json").write_text("{")
    assert main(["import", str(folder), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "tokenizer" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["owl3_static"]


def test_a_template_that_ends_no_answer_is_known():
    """LLaVA's newer files have one, for answering alone."""
    tokenizer = family_tokenizer("llama2")
    assert writes_an_end(tokenizer, IMAGE)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert not writes_an_end(tokenizer, IMAGE)
