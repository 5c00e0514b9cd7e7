"""The same chat has the same tokens in training, evaluation, chat, benchmarks and pipelines:
over families of templates."""

import copy
import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from family_templates import FAMILIES, family_tokenizer
from owlfuse.artifacts.hf.processing import OwlfuseImageProcessor, OwlfuseProcessor
from owlfuse.core.errors import DataError
from owlfuse.core.types import Sample
from owlfuse.data.chat.answer_format import AnswerFormat
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import prepare, render
from owlfuse.evaluation.lmms.prompts import Prompt, render_prompt
from owlfuse.evaluation.questions import question_samples
from owlfuse.serving.chat import Conversation

KINDS = ("byte_level", "unigram")
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]
PIECES = (
    "red",
    "the dog",
    "a\n",
    "\nb",
    " ",
    "\n\n",
    "Is it?",
    "USER: ",
    "assistant",
    "é",
    "日本",
    "2 + 3",
    "<think",
    "###",
)
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
SAID = TEXT.filter(lambda text: text.strip() and "###" not in text)
ASKED = st.lists(st.none() | TEXT, min_size=1, max_size=4).filter(
    lambda parts: any(part and part.strip() for part in parts)
)
CHATS = st.lists(st.tuples(ASKED, SAID), min_size=1, max_size=3)
PROPERTY = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)


def sample_of(chat):
    """Questions are lists of texts and None for a picture."""
    messages, images = [], []
    for asked, answer in chat:
        parts = [
            {"type": "image"} if part is None else {"type": "text", "text": part} for part in asked
        ]
        images += [f"{len(images)}.png" for part in asked if part is None]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample("s:1", "s", messages, images)


def processor_for(tokenizer):
    images = OwlfuseImageProcessor({"height": 8, "width": 8}, [0.0] * 3, [1.0] * 3, "bilinear")
    return OwlfuseProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def tokens_of(processor, text):
    return processor.encode_texts([text], None)["input_ids"][0]


@pytest.mark.parametrize("break_behind_images", [True, False])
@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.fast_cases(8)
def test_every_prompt_is_the_beginning_of_what_was_trained(family, kind, break_behind_images):
    tokenizer = prepare(family_tokenizer(family, kind), break_behind_images=break_behind_images)
    encoder, processor = ChatEncoder(tokenizer, 1, 10**6), processor_for(tokenizer)

    @PROPERTY
    @given(CHATS)
    def check(chat):
        sample = sample_of(chat)
        trained = encoder.encode(sample)
        asked = Sample("s:1", "s", sample.messages[:-1], sample.images)
        prompts = {
            "evaluation": encoder.encode_prompt(asked).input_ids.tolist(),
            "tasks and chat": tokens_of(processor, render(tokenizer, asked.messages, True)),
            "lmms-eval": tokens_of(
                processor,
                render_prompt(Prompt("s:1", asked.messages, list(asked.images)), processor),
            ),
            "pipelines": tokens_of(
                processor, processor.apply_chat_template(asked.messages, add_generation_prompt=True)
            ),
            "exports": tokens_of(
                processor,
                tokenizer.apply_chat_template(
                    asked.messages, tokenize=False, add_generation_prompt=True
                ),
            ),
        }
        whole = trained.input_ids.tolist()
        for name, prompt in prompts.items():
            assert whole[: len(prompt)] == prompt, name
            assert (trained.labels[len(prompt) :] != -100).any(), name
        first = len(prompts["evaluation"])
        assert trained.labels[first] != -100

    check()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_what_ends_an_answer_is_supervised_and_ends_generation(family, kind):
    tokenizer = prepare(family_tokenizer(family, kind))
    encoder = ChatEncoder(tokenizer, 1)
    mark = FAMILIES[family][3]
    assert encoder.answer_format.end_mark == mark
    encoded = encoder.encode(sample_of([(["Hi"], "Ho"), (["More"], "red")]))
    last = encoded.labels[encoded.labels != -100].tolist()[-1]
    ends = encoder.answer_format.generation(tokenizer)
    if family == "text_mark":
        assert ends["stop_strings"] == [mark]
    else:
        assert last in ends["eos_token_id"]
        assert tokenizer.convert_ids_to_tokens(last) == mark
    assert tokenizer.eos_token_id in ends["eos_token_id"]
    assert ends["pad_token_id"] == tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_generated_answer_is_read_as_the_data_write_it(family, kind):
    tokenizer = prepare(family_tokenizer(family, kind))
    encoder = ChatEncoder(tokenizer, 1)
    sample = sample_of([(["Hi"], "Ho"), (["More"], "It is red.")])
    encoded = encoder.encode(sample)
    prompt = encoder.encode_prompt(Sample("s:1", "s", sample.messages[:-1]))
    generated = encoded.labels[len(prompt.input_ids) :]
    assert encoder.answers([generated[generated != -100]]) == ["It is red."]


@pytest.mark.parametrize("family", FAMILIES)
def test_preparing_twice_changes_nothing_and_a_saved_tokenizer_comes_back(family, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = prepare(family_tokenizer(family))
    template, size = tokenizer.chat_template, len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for again in (prepare(tokenizer), prepare(AutoTokenizer.from_pretrained(tmp_path))):
        assert (again.chat_template, len(again)) == (template, size)
        assert again.pad_token is not None


def test_a_template_has_the_same_date_on_every_day(monkeypatch):
    import transformers.utils.chat_template_utils as utils

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    encoder = ChatEncoder(family_tokenizer("dated"), 1)
    today = encoder.encode(sample_of([(["Hi"], "Ho")])).input_ids.tolist()
    assert "Today is 26 Jul 2024." in encoder.tokenizer.decode(today)
    monkeypatch.setattr(utils, "datetime", Later)
    assert encoder.encode(sample_of([(["Hi"], "Ho")])).input_ids.tolist() == today


def thinking_chat(*turns):
    messages = []
    for asked, answer in turns:
        answer = answer if isinstance(answer, dict) else {"content": answer}
        content = [{"type": "text", "text": answer["content"]}]
        messages += [{"role": "user", "content": [{"type": "text", "text": asked}]}]
        messages += [{"role": "assistant", **answer, "content": content}]
    return Sample("s:1", "s", messages)


THOUGHT = "<think>\nIt looks red.\n</think>\n\n"


@pytest.mark.parametrize(
    "answer", [{"content": "red", "reasoning_content": "It looks red."}, f"{THOUGHT}red"]
)
@pytest.mark.parametrize("before", [[], [("Hi", "Ho")]])
def test_thoughts_are_supervised_as_the_data_have_them(answer, before):
    encoder = ChatEncoder(family_tokenizer("qwen3"), 1)
    encoded = encoder.encode(thinking_chat(*before, ("What?", answer)))
    text = encoder.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert text == ("Ho<|im_end|>" if before else "") + f"{THOUGHT}red<|im_end|>"
    asked = thinking_chat(*before, ("What?", answer))
    asked.messages = asked.messages[:-1]
    encoder.thinking = True
    prompt = encoder.encode_prompt(asked).input_ids.tolist()
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt
    assert encoder.answers([encoded.input_ids[len(prompt) :]]) == ["red"]


@pytest.mark.parametrize("family", ["qwen3", "qwen"])
def test_a_thought_that_the_template_leaves_out_is_refused(family):
    encoder = ChatEncoder(family_tokenizer(family), 1)
    thought = {"content": "red", "reasoning_content": "It looks red."}
    with pytest.raises(
        DataError, match="sample s:1.*(reasoning_content|thoughts of earlier turns)"
    ):
        encoder.encode(thinking_chat(("What?", thought), ("Sure?", "yes")))


def test_an_empty_thought_of_the_template_is_no_part_of_the_answer_in_any_turn():
    encoder = ChatEncoder(family_tokenizer("qwen3"), 1)
    encoded = encoder.encode(thinking_chat(("Hi", "Ho"), ("More", "No")))
    assert (
        encoder.tokenizer.decode(encoded.labels[encoded.labels != -100])
        == "Ho<|im_end|>No<|im_end|>"
    )


TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}{% "
    "for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor "
    "%}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}


@pytest.mark.parametrize("content", ["", "I look."])
def test_calls_of_tools_are_supervised_and_their_results_are_not(content):
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = TOOLS
    encoder = ChatEncoder(tokenizer, 1)
    sample = thinking_chat(("What?", {"content": content, "tool_calls": [CALL]}), ("zoomed", "red"))
    sample.messages[2]["role"] = "tool"
    sample.tools = [{"type": "function", "function": {"name": "zoom"}}]
    encoded = encoder.encode(sample)
    said = encoder.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert (
        said
        == content + '<call>{"name": "zoom", "arguments": {"x": 1}}</call><|im_end|>red<|im_end|>'
    )
    assert '"zoom"}}]<|im_end|>' in encoder.tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("key", ["name", "tool_call_id"])
@pytest.mark.parametrize("is_written", [True, False])
def test_names_that_a_template_does_not_write_are_noted(key, is_written):
    tokenizer = family_tokenizer("qwen")
    if is_written:
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "m.content", f"(m.{key} or '') + m.content"
        )
    sample = thinking_chat(("What?", "red"))
    sample.messages[0][key] = "anna"
    encoder = ChatEncoder(tokenizer, 1)
    for _ in range(2):
        encoder.encode(sample)
    texts = [] if is_written else [f"a turn's '{key}', which the chat template does not write"]
    assert [note.text for note in sample.notes] == texts


@pytest.mark.parametrize("is_written", [True, False])
def test_ids_of_calls_that_a_template_does_not_write_are_noted(is_written):
    tokenizer = family_tokenizer("qwen")
    written = "'<call>' + call.id + ' '" if is_written else "'<call>'"
    tokenizer.chat_template = TOOLS.replace("'<call>'", written)
    sample = thinking_chat(("What?", {"content": "", "tool_calls": [{**CALL, "id": "1"}]}))
    ChatEncoder(tokenizer, 1).encode(sample)
    unused = "a turn's 'tool_calls.id', which the chat template does not write"
    assert [note.text for note in sample.notes] == ([] if is_written else [unused])


def test_tools_that_a_template_does_not_write_are_refused():
    encoder = ChatEncoder(family_tokenizer("qwen"), 1)
    sample = thinking_chat(("What?", {"content": "I look.", "tool_calls": [CALL]}))
    with pytest.raises(
        DataError, match="sample s:1 has tool_calls, which the chat template does not write"
    ):
        encoder.encode(sample)
    sample = thinking_chat(("What?", "red"))
    sample.tools = [CALL]
    with pytest.raises(
        DataError, match="sample s:1 has tools, which the chat template does not write"
    ):
        encoder.encode(sample)


def test_tools_that_are_written_behind_an_answer_are_refused():
    """As Mistral's templates write them, before the last question."""
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = (
        "{% set seen = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set seen.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if tools and loop.index0 == seen.last %}{{ tools | tojson }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = ChatEncoder(tokenizer, 1)
    tools = [{"type": "function", "function": {"name": "zoom"}}]
    single = thinking_chat(("What?", "red"))
    several = thinking_chat(("Hi", "Ho"), ("What?", "red"))
    single.tools = several.tools = tools
    assert encoder.encode(single)
    with pytest.raises(DataError, match="writes the tools behind an answer"):
        encoder.encode(several)
    several.messages[1]["supervised"] = False
    assert encoder.encode(several)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<|im_end|>", r"sample s:1 holds the tokenizer's control token <\|im_end\|>.*{where}"),
        ("\ud83d", r"{where} holds the lone surrogate U\+D83D"),
        ("<image>", "holds the tokenizer's control token <image>.*{where}"),
    ],
)
@pytest.mark.parametrize(
    "key", ["argument", "argument_name", "id", "name", "tool_call_id", "tools"]
)
def test_what_no_text_may_hold_is_refused_beside_the_text_too(key, text, message):
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = TOOLS
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": [1]}}}
    sample = thinking_chat(("What?", {"content": "", "tool_calls": [call]}), ("zoomed", "red"))
    sample.messages[2]["role"] = "tool"
    if key == "argument":
        call["function"]["arguments"]["x"].append({"y": text})
    elif key == "argument_name":
        call["function"]["arguments"][text] = 1
    elif key == "id":
        call["id"] = text
    elif key == "tools":
        sample.tools = [{"type": "function", "function": {"name": "zoom", "description": text}}]
    else:
        sample.messages[2][key] = text
    turn = 3 if key in ("name", "tool_call_id") else 2
    where = "its list of tools" if key == "tools" else f"a tool call or name in turn {turn}"
    with pytest.raises(DataError, match=message.format(where=where)):
        ChatEncoder(tokenizer, 1).encode(sample)


def test_the_word_image_in_a_thought_is_ordinary_tokens():
    encoder = ChatEncoder(family_tokenizer("qwen3"), 1)
    thought = {"content": "red", "reasoning_content": "An <image> is shown."}
    encoded = encoder.encode(thinking_chat(("What?", thought)))
    text = encoder.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert "An <image> is shown." in text
    assert not encoded.placeholder.any()


def test_an_answer_that_the_data_exclude_is_read_and_not_learned():
    encoder = ChatEncoder(family_tokenizer("qwen"), 1)
    sample = thinking_chat(("Hi", {"content": "blue", "supervised": False}), ("Sure?", "red"))
    encoded = encoder.encode(sample)
    assert encoder.tokenizer.decode(encoded.labels[encoded.labels != -100]) == "red<|im_end|>"
    assert "blue" in encoder.tokenizer.decode(encoded.input_ids)
    assert [answer for _, answer, _ in question_samples(sample)] == ["red"]
    sample.messages[3]["supervised"] = False
    with pytest.raises(DataError, match="exclude every answer"):
        encoder.encode(sample)


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("text", ["<image> and <video>", "List <image>, <video>.", "<image>"])
def test_the_word_image_is_ordinary_tokens(family, kind, text):
    encoder = ChatEncoder(family_tokenizer(family, kind), 2)
    sample = sample_of([([None, "What?", None], text), (["and <image>?"], text)])
    encoded = encoder.encode(sample)
    assert encoded.placeholder.sum() == 4
    assert (encoded.input_ids == encoder.image_id).sum() == 4
    said = encoder.tokenizer.decode(encoded.labels[encoded.labels != -100])
    assert said.count(text) == 2
    assert "and <image>?" in encoder.tokenizer.decode(encoded.input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_stand_alone_or_with_what_was_said_before(family):
    encoder = ChatEncoder(family_tokenizer(family), 1)
    sample = sample_of(
        [([None, "\ncode?"], "R1"), ([None, "\ncode?"], "B2"), ([None, "\ncode?"], "G3")]
    )
    alone = [
        encoder.tokenizer.decode(encoder.encode_prompt(q).input_ids)
        for q, _, _ in question_samples(sample)
    ]
    assert not any(code in prompt for prompt in alone for code in ("R1", "B2", "G3"))
    assert [prompt.count("<image>") for prompt in alone] == [1, 2, 3]
    whole = encoder.encode(sample).input_ids.tolist()
    for question, _, _ in question_samples(sample, history=True)[-1:]:
        prompt = encoder.encode_prompt(question).input_ids.tolist()
        assert whole[: len(prompt)] == prompt


def test_a_conversation_gives_the_prompt_of_training(monkeypatch):
    tokenizer = prepare(family_tokenizer("qwen3"))
    processor = processor_for(copy.deepcopy(tokenizer))
    seen = []

    class Model:
        device = "cpu"

        class model:
            class llm:
                class config:
                    model_type = "llama"

                    @classmethod
                    def get_text_config(cls, decoder):
                        return cls

        def generate(self, streamer=None, **inputs):
            seen.append(inputs["input_ids"][0].tolist())
            streamer.put(inputs["input_ids"])
            for number in tokenizer("Ho", add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]:
                streamer.put(__import__("torch").tensor([number]))
            streamer.end()
            return inputs["input_ids"]

    talk = Conversation(Model(), processor)
    assert talk.ask("Hi", lambda piece: None) == "Ho"
    talk.ask("More", lambda piece: None)
    encoder = ChatEncoder(tokenizer, 1)
    for prompt, chat in zip(seen, ([(["Hi"], "Ho")], [(["Hi"], "Ho"), (["More"], "No")])):
        assert encoder.encode(sample_of(chat)).input_ids.tolist()[: len(prompt)] == prompt


def test_an_end_mark_of_several_tokens_is_held_back_from_a_reader():
    from owlfuse.serving.chat import AnswerStreamer

    shown = []
    pieces = AnswerStreamer(family_tokenizer("text_mark"), shown.append, "###")
    for text in ("It is", " red.\n#", "#", "#\n"):
        pieces.on_finalized_text(text)
    pieces.on_finalized_text("", stream_end=True)
    assert "".join(shown) == "It is red.\n"
    assert AnswerFormat.of(prepare(family_tokenizer("text_mark"))).end_ids == ()


@pytest.mark.parametrize("family", ["text_mark", "llama2"])
def test_an_answer_without_its_end_is_cut(family):
    tokenizer = prepare(family_tokenizer(family))
    answer_format = AnswerFormat.of(tokenizer)
    ends = answer_format.generation(tokenizer)["eos_token_id"]
    answer = tokenizer("It is red", add_special_tokens=False)["input_ids"]
    end = tokenizer(answer_format.end_mark, add_special_tokens=False)["input_ids"]
    assert answer_format.is_cut(tokenizer, answer, ends)
    assert not answer_format.is_cut(tokenizer, [*answer, *end], ends)
    assert not answer_format.is_cut(tokenizer, [*answer, tokenizer.eos_token_id], ends)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_of_roles_are_refused_in_texts_whether_or_not_they_are_marked_special(special):
    tokenizer = family_tokenizer("gpt2")
    role = AddedToken("<|Assistant|>", special=special, normalized=False)
    tokenizer.add_tokens([role], special_tokens=special)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|Assistant|>' if m.role == 'assistant' else 'U:' }}"
        "{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    encoder = ChatEncoder(prepare(tokenizer), 1)
    chat = [message("user", "Say <|Assistant|> Sure!"), message("assistant", "No.")]
    with pytest.raises(DataError, match="<|Assistant|>"):
        encoder.encode(Sample("s:1", "s", chat))
    chat = [message("user", "Say sure!"), message("assistant", "No.")]
    assert encoder.encode(Sample("s:1", "s", chat))


def message(role, text):
    return {"role": role, "content": [{"type": "text", "text": text}]}


TOOL_TEMPLATES = {
    # a call does not end as an answer does
    "result inside": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}"
        "{% endfor %}{{ '\n' if m.tool_calls else '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # nothing stands between a result and the next call
    "no header": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
        "{% elif m.tool_calls %}{{ '[CALLS]' + m.tool_calls[0].function | tojson + eos_token }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    ),
}


def call(name):
    return [{"type": "function", "function": {"name": name, "arguments": {"x": 1}}}]


def learned(family, template, *messages):
    tokenizer = family_tokenizer(family)
    tokenizer.chat_template = TOOL_TEMPLATES[template]
    encoded = ChatEncoder(prepare(tokenizer), 1).encode(Sample("s:1", "s", list(messages)))
    return tokenizer.decode(encoded.labels[encoded.labels != -100])


def test_a_template_that_writes_results_inside_of_what_is_learned_is_refused():
    chat = [
        message("user", "What?"),
        {**message("assistant", ""), "tool_calls": call("zoom")},
        message("tool", "zoomed"),
        message("assistant", "red"),
    ]
    with pytest.raises(DataError, match="writes the result of a tool before '<.im_end.>'"):
        learned("qwen", "result inside", *chat)


def test_a_later_call_is_learned_from_its_beginning():
    chat = [
        message("user", "What?"),
        {**message("assistant", ""), "tool_calls": call("zoom")},
        message("tool", "a"),
        {**message("assistant", ""), "tool_calls": call("look")},
        message("tool", "b"),
        message("assistant", "red"),
    ]
    text = learned("llama2", "no header", *chat)
    assert text.count("[CALLS]") == 2
    assert "[RESULT]" not in text
    assert text.endswith("red</s>")
