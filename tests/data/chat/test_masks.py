"""What is supervised, to the character: over random chats, every template, and tokenizers of
three kinds."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import template_names, use_template
from small_tokenizers import byte_level, unigram

TEMPLATES = {
    # what is supervised of an answer, given the tokenizer's own end of sequence
    "llama2": lambda answer, end: f" {answer.strip()} {end}",
    "llama3": lambda answer, end: f"{answer.strip()}<|eot_id|>",
    "chatml": lambda answer, end: f"{answer}<|im_end|>",
    "vicuna": lambda answer, end: f" {answer}{end}",
    "mistral": lambda answer, end: f" {answer}{end}",
}
LOOK_ALIKE = (
    "ASSISTANT:",
    " ASSISTANT: yes",
    "USER: ",
    "[INST] ",
    " [/INST]",
    "<<SYS>>",
    "<|im_start",
    "im_end|>",
    "assistant\n",
    "\n\n",
    "\nHuman: ",
    "### Response:",
    "</ s>",
    "\n",
    " ",
    "  ",
    "\t",
    "A dog",
    "red",
    "the",
    "é",
    "e\u0301",
    "日本語",
    "🙂",
    "👩‍👩‍👧",
    "\u00a0",
    "\u2028",
    "{{ x }}",
    "{% if %}",
    "\ue000",
    "\ue0011\ue001",
)
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁")
CONTROL = (
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<0x",
)
"""What is refused, which hypothesis may take from this file; and the names of bytes, which some
decoders take for bytes."""
PIECES = st.lists(st.sampled_from(LOOK_ALIKE) | st.text(CHARACTERS, max_size=4), max_size=6).map(
    "".join
)
TEXT = PIECES.filter(lambda text: not any(token in text for token in CONTROL))
ANSWER = TEXT.filter(str.strip)
CHATS = st.tuples(
    st.none() | TEXT, st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4), st.none() | TEXT
)
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def parts(text):
    return [{"type": "text", "text": text}]


def sample_of(chat):
    system, turns, last = chat
    said = [("system", system)] if system is not None else []
    said += [(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn)]
    said += [("user", last)] if last is not None else []
    return Sample("s:1", "s", [{"role": role, "content": parts(text)} for role, text in said])


def supervised(tokenizer, encoded):
    """The text of each run of supervised tokens, told apart by what is not supervised between
    them."""
    # some decoders drop a space at the very start
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    runs, run = [], []
    for label in [*encoded.labels.tolist(), -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(anchor + run).removeprefix("a"))
            run = []
    return runs


@pytest.fixture(scope="module")
def tokenizers(shapes):
    return {
        "shapes": AutoTokenizer.from_pretrained(shapes / "tokenizer"),
        "byte_level": byte_level(),
        "unigram": unigram(),
    }


@pytest.mark.parametrize("kind", ["shapes", "byte_level", "unigram"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.fast_cases(4)
def test_the_supervised_tokens_are_each_answer_with_its_end_mark(tokenizers, kind, template):
    tokenizer = use_template(copy.deepcopy(tokenizers[kind]), template)
    encoder = ChatEncoder(tokenizer, 1, max_length=10**6)

    @PROPERTY
    @given(CHATS)
    def check(chat):
        encoded = encoder.encode(sample_of(chat))
        expected = [TEMPLATES[template](answer, tokenizer.eos_token) for _, answer in chat[1]]
        assert supervised(tokenizer, encoded) == expected
        assert all(
            label in (-100, i)
            for i, label in zip(encoded.input_ids.tolist(), encoded.labels.tolist())
        )

    check()


@PROPERTY
@given(chat=CHATS)
def test_the_tokenizers_own_template_is_supervised_to_the_character(tokenizers, chat):
    encoded = ChatEncoder(tokenizers["shapes"], 1, max_length=10**6).encode(sample_of(chat))
    assert supervised(tokenizers["shapes"], encoded) == [
        f"{answer}<|end|>" for _, answer in chat[1]
    ]


@pytest.mark.parametrize("kind", ["shapes", "byte_level", "unigram"])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.fast_cases(5)
def test_the_prompt_of_generation_is_what_stands_before_the_first_supervised_token(
    tokenizers, kind, template
):
    tokenizer = use_template(copy.deepcopy(tokenizers[kind]), template)
    encoder = ChatEncoder(tokenizer, 1)

    @PROPERTY
    @given(st.tuples(st.none() | TEXT, TEXT, ANSWER))
    def check(chat):
        system, question, answer = chat
        whole = encoder.encode(sample_of((system, [(question, answer)], None)))
        prompt = encoder.encode_prompt(sample_of((system, [], question)))
        first = (whole.labels != -100).nonzero()[0].item()
        assert whole.input_ids[:first].tolist() == prompt.input_ids.tolist()

    check()


def test_every_template_has_its_expectation_here():
    assert template_names() == sorted(TEMPLATES)


TURNS = [
    ("system", "Be kind."),
    ("user", "Hi"),
    ("assistant", "Ho"),
    ("user", "More"),
    ("assistant", "No"),
]
RENDERED = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Ho </s><s>[INST] More [/INST] No </s>"
    ),
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe "
    "kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "More<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nNo<|eot_id|>",
    "chatml": "<|im_start|>system\nBe "
    "kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n",
    "vicuna": "<s>Be kind. USER: Hi ASSISTANT: Ho</s>USER: More ASSISTANT: No</s>",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Ho</s>[INST] More [/INST] No</s>",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_writes_what_its_model_was_trained_on(tokenizers, template):
    tokenizer = use_template(copy.deepcopy(tokenizers["byte_level"]), template)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == RENDERED[template]


@pytest.mark.parametrize(
    ("template", "end"), [("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("vicuna", "</s>")]
)
def test_an_end_mark_is_one_token_which_ends_generation(tokenizers, template, end):
    tokenizer = use_template(copy.deepcopy(tokenizers["unigram"]), template)
    assert tokenizer.eos_token == end
    encoded = ChatEncoder(tokenizer, 1).encode(sample_of((None, [("Hi", "Ho")], None)))
    assert encoded.labels[encoded.labels != -100][-1] == tokenizer.eos_token_id


QWEN3 = (  # an empty thought stands before the last answer alone
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ "
    "m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_LAST = (  # of Mistral's v0.3: the system message stands in the last question
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last or loop.index0 == messages | length - 2 %}{{ system + '\n\n' }}{% endif %}{{ "
    "m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(QWEN3, ["Ho<|im_end|>", "No<|im_end|>"]), (SYSTEM_LAST, [" Ho</s>", " No</s>"])],
    ids=["qwen3", "system_last"],
)
def test_a_template_that_treats_the_last_turn_otherwise_is_supervised_as_it_is_rendered(
    tokenizers, template, expected
):
    tokenizer = use_template(copy.deepcopy(tokenizers["byte_level"]), "chatml")
    tokenizer.eos_token, tokenizer.chat_template = "</s>", template
    encoded = ChatEncoder(tokenizer, 1).encode(
        sample_of(("Be kind.", [("Hi", "Ho"), ("More", "No")], None))
    )
    assert supervised(tokenizer, encoded) == expected


def test_a_template_of_the_users_own_file(tokenizers, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% "
        "endif %}{% endfor %}\n"
    )
    tokenizer = use_template(copy.deepcopy(tokenizers["byte_level"]), str(file))
    encoded = ChatEncoder(tokenizer, 1).encode(sample_of((None, [("Hi", "Ho")], None)))
    assert tokenizer.decode(encoded.input_ids) == "user>Hiassistant>Ho</s>"
    assert supervised(tokenizer, encoded) == ["Ho</s>"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "chat_template: .*mine.jinja: no such file"),
        ("{% for x %}", "chat_template: .*mine.jinja: no Jinja template: line 1: "),
        ("", "chat_template: .*mine.jinja is empty"),
    ],
)
def test_a_file_that_is_no_template_is_named(tokenizers, tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises(DataError, match=message):
        use_template(copy.deepcopy(tokenizers["byte_level"]), str(tmp_path / "mine.jinja"))


def test_a_template_that_there_is_not_is_told_with_those_that_there_are(tokenizers):
    with pytest.raises(
        DataError, match="chat_template: lama2 is none of chatml, llama2, llama3, mistral, vicuna"
    ):
        use_template(tokenizers["byte_level"], "lama2")


def test_a_tokenizer_without_an_end_mark_is_refused(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["byte_level"])
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        use_template(tokenizer, "vicuna")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') "
            "}}{% endif %}"
            "{{ m.content }}</s>{% endfor %}",
            "no system",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
            "changes an answer otherwise",
        ),
        (
            (
                "{% for m in messages %}{{ m.content }}{{ m.content if loop.index0 == 2 }}</s>{% "
                "endfor %}"
            ),
            "writes the text of turn 3 not once",
        ),
    ],
)
def test_what_a_template_objects_to_or_cannot_be_supervised_names_the_sample(
    tokenizers, template, message
):
    tokenizer = copy.deepcopy(tokenizers["byte_level"])
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"sample s:1: .*{message}"):
        ChatEncoder(tokenizer, 1).encode(sample_of(("Be kind.", [("Hi", "Ho")], None)))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}",
            "does not write what the user says",
        ),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            "does not write what the user says",
        ),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
            "writes an answer 0 times",
        ),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes nothing behind an answer"),
        (
            "{{ strftime_now(messages[0].content) }}{{ messages[0].content }}",
            "by a format that is no constant",
        ),
    ],
)
def test_a_template_that_no_chat_can_be_supervised_with_is_refused_at_once(
    tokenizers, template, message
):
    tokenizer = copy.deepcopy(tokenizers["byte_level"])
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        ChatEncoder(tokenizer, 1)
