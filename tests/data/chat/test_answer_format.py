"""What of generated ids is the answer, where the model thinks first."""

import pytest

from family_templates import family_tokenizer
from owlfuse.data.chat.encoder import ChatEncoder


def encoder_of(opened):
    """Of a model that is asked for a thought, which its prompts begin where that is `opened`."""
    tokenizer = family_tokenizer("qwen3")
    if opened:
        tokenizer.chat_template += (
            "{% if add_generation_prompt and enable_thinking %}{{ '<think>\n' }}{% endif %}"
        )
    return ChatEncoder(tokenizer, 1, thinking=True)


@pytest.mark.parametrize(
    ("opened", "generated", "answer", "unfinished"),
    [
        (False, "<think>\nIt looks red.\n</think>\n\nred<|im_end|>", "red", False),
        (False, "<think>\nIt looks red", "", True),
        (False, "\n<think>It looks<|im_end|>", "", True),
        # of a model that thinks nothing
        (False, "It is red", "It is red", False),
        (False, "It says <think> there", "It says <think> there", False),
        (True, "It looks red.\n</think>\n\nred<|im_end|>", "red", False),
        (True, "It looks red", "", True),
    ],
)
def test_a_thought_that_does_not_end_is_no_answer(opened, generated, answer, unfinished):
    encoder = encoder_of(opened)
    assert encoder.answer_format.thought_opened is opened
    rows = [encoder.tokenizer(generated, add_special_tokens=False)["input_ids"]]
    assert encoder.answers(rows) == [answer]
    assert encoder.unfinished_thoughts(rows) == [unfinished]
    # A thought that the model begins by itself is none of the answer either.
    encoder.thinking = False
    begun = generated.lstrip().startswith("<think>")
    assert encoder.unfinished_thoughts(rows) == [begun and unfinished]
    assert encoder.answers(rows)[0] == (
        answer if begun or not opened else generated_text(generated)
    )


def generated_text(generated):
    """What is decoded of a generated text, without its end mark."""
    return generated.removesuffix("<|im_end|>")
