"""Tokenizers and templates as others publish them, which transformers or a template would change
without a word."""

import json

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.answer_format import AnswerFormat
from owlfuse.data.chat.encoder import UNKNOWN, ChatEncoder
from owlfuse.data.chat.tokenizer import load_tokenizer, prepare, render, use_template
from small_tokenizers import byte_level, unigram

TURN = "{{ '<' + m.role + '>' }}{{ m.content }}"
PLAIN = (
    "{% for m in messages %}" + TURN + "</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def part(text):
    return [{"type": "text", "text": text}]


def chat(*turns):
    messages = [{"role": role, "content": part(text)} for role, text in turns]
    return Sample("s", "source", messages)


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or byte_level()
    tokenizer.chat_template = template
    return tokenizer


def with_a_number():
    """A tokenizer with a token for a whole number, as the vocabularies of others have it."""
    tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(["2024 2024 2024"] * 9, trainer)
    return tokenizer


def test_a_tokenizer_splits_as_its_file_says(tmp_path, caplog):
    """transformers builds GPT2Tokenizer of vocabulary and merges alone."""
    tokenizer = with_a_number()
    steps = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}))
    text = "In 2024, 12.50"
    expected = tokenizer(text).input_ids
    # what would be trained otherwise
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids != expected
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(text).input_ids == expected
    assert "splits texts otherwise than its tokenizer.json, which is followed" in caplog.text
    loaded.save_pretrained(tmp_path / "again")
    caplog.clear()
    assert load_tokenizer(str(tmp_path / "again"))(text).input_ids == expected
    assert not caplog.text


def test_a_space_behind_a_control_token_is_where_the_file_has_it(tmp_path, caplog):
    """transformers leaves the normalizer of Llama 2's file out, by which `<s>[INST]` has one."""
    letters = "\u2581[]INSTUERabcdefghijklmnopqrstuvwxyz:,.0123456789'"
    vocab = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    file = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    file.normalizer = normalizers.Sequence(steps)
    file.add_special_tokens(["<unk>", "<s>", "</s>"])
    file.save(str(tmp_path / "tokenizer.json"))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, **marks}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    text = "<s>[INST] yes</s>USER: A"
    expected = file.encode(text, add_special_tokens=False).ids
    released = AutoTokenizer.from_pretrained(tmp_path)
    assert released(text, add_special_tokens=False).input_ids != expected
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(text, add_special_tokens=False).input_ids == expected
    assert "splits texts otherwise than its tokenizer.json, which is followed" in caplog.text


def test_mistrals_own_pattern_is_followed_where_a_file_has_another(tmp_path, caplog):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [f"token{number}" for number in range(100_000)]  # below, transformers looks for none
    vocab = {token: number for number, token in enumerate([*alphabet, "20", *others])}
    file = Tokenizer(models.BPE(vocab, [("2", "0")]))
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated")
    steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    file.pre_tokenizer = pre_tokenizers.Sequence(steps)
    file.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "mistral", "transformers_version": "4.43.0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(AutoTokenizer.from_pretrained(tmp_path)("20").input_ids) == 1
    assert len(load_tokenizer(str(tmp_path))("20").input_ids) == 2
    assert "whose own is followed" in caplog.text


def test_a_header_of_which_earlier_answers_have_the_beginning_alone():
    """As that of Qwen3-Thinking, whose prompts end with the beginning of a thought."""
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>\n' }}"
        "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n<think>\n' }}{% endif %}"
    )
    tokenizer = with_template(template)
    encoder = ChatEncoder(tokenizer, 1)
    encoded = encoder.encode(
        chat(("user", "a dog"), ("assistant", "red"), ("user", "a cat"), ("assistant", "two"))
    )
    learned = tokenizer.decode(encoded.input_ids[encoded.labels != -100])
    assert learned.startswith("red</s>")
    assert learned.endswith("two</s>")


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_text_that_the_template_leaves_out_is_refused(role):
    template = PLAIN.replace(
        TURN, "{% if m.role in ('user', 'assistant') %}" + TURN + "{% endif %}"
    )
    turns = [("user", "a dog"), ("assistant", "red"), ("user", "a cat"), ("assistant", "two")]
    turns.insert(0 if role == "system" else 2, (role, "the grass"))
    encoder = ChatEncoder(with_template(template), 1)
    with pytest.raises(
        DataError, match=f"a {role} message, which the chat template does not write"
    ):
        encoder.encode(chat(*turns))
    assert ChatEncoder(with_template(PLAIN), 1).encode(chat(*turns))


def test_an_end_mark_of_ordinary_tokens_is_no_part_of_an_answer():
    """One token in the vocabulary, which may be joined with the answer's last character."""
    tokenizer = with_a_number()
    dot = tokenizer.convert_tokens_to_ids(".")
    assert not tokenizer.added_tokens_decoder.get(dot)
    prepare(with_template(PLAIN.replace("</s>", "."), tokenizer))
    answer_format = AnswerFormat.of(tokenizer)
    assert (answer_format.end_mark, answer_format.end_ids) == (".", ())
    assert answer_format.generation(tokenizer)["stop_strings"] == ["."]
    assert answer_format.answer(tokenizer, tokenizer("red.").input_ids) == "red"


def test_characters_that_the_tokenizer_does_not_have_are_counted():
    tokenizer = unigram()
    encoder = ChatEncoder(with_template(PLAIN, tokenizer), 1)
    known = chat(("user", "a dog"), ("assistant", "red"))
    encoder.encode(known)
    assert UNKNOWN not in known.notes
    encoder.unknown_id = tokenizer.convert_tokens_to_ids("\u2581dog")
    for _ in range(2):  # a chat that is cut is encoded several times
        encoder.encode(known)
    assert known.notes.count(UNKNOWN) == 1


def test_a_further_template_that_loops_over_tools_spares_the_default_one():
    tools = "{% for tool in tools %}{{ tool.name }}{% endfor %}" + PLAIN
    tokenizer = prepare(with_template({"default": PLAIN, "tool_use": tools}))
    assert set(tokenizer.chat_template) == {"default", "tool_use"}
    with pytest.raises(DataError, match=r"does not write what the user says.*\(template rag\)"):
        prepare(with_template({"default": PLAIN, "rag": "nothing"}))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_chatml_begins_as_the_tokenizers_texts_do(adds_bos):
    tokenizer = with_a_number()
    if adds_bos:
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert begins == adds_bos
    use_template(tokenizer, "chatml")
    text = render(prepare(tokenizer), [{"role": "user", "content": "a"}])
    assert text.startswith("<s><|im_start|>" if adds_bos else "<|im_start|>")


@pytest.mark.parametrize("name", ["thinking", "enable_thinking"])
def test_a_thought_is_asked_for_by_either_name(name):
    template = PLAIN.replace("<assistant>", "<assistant>{% if " + name + " %}<think>{% endif %}")
    tokenizer = prepare(with_template(template))
    question = [{"role": "user", "content": "a"}]
    assert render(tokenizer, question, True, thinking=True).endswith("<think>")
    assert not render(tokenizer, question, True).endswith("<think>")


def test_spaces_that_a_post_processor_leaves_out_of_the_offsets_are_not_doubled():
    """As GPT-2's does by default."""
    template = (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=True
    )
    encoder = ChatEncoder(tokenizer, 1)
    sample = chat(("user", "what is there"), ("assistant", "two dogs"))
    encoded = encoder.encode(sample)
    assert (
        tokenizer.decode(encoded.input_ids)
        == "### user: what is there</s>### assistant: two dogs</s>"
    )
    prompt = encoder.encode_prompt(chat(("user", "what is there"))).input_ids
    assert encoded.input_ids[: len(prompt)].tolist() == prompt.tolist()
    learned = encoded.input_ids[encoded.labels != -100]
    assert tokenizer.decode(learned) == "two dogs</s>"


def test_an_end_mark_of_ordinary_text_inside_of_an_answer_is_noted():
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ' ### ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = ChatEncoder(with_template(template), 1)
    plain, headings = (
        chat(("user", "?"), ("assistant", "a")),
        chat(("user", "?"), ("assistant", "a ### b")),
    )
    encoder.encode(plain)
    encoder.encode(headings)
    assert not plain.notes
    assert [note.text for note in headings.notes] == [
        "an answer has '###' in it, at which generation stops"
    ]
