"""Answers of an evaluation."""

import pytest

from helpers import ROWS, llm_fields, make_batch, make_model
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import use_template
from owlfuse.evaluation.generation import answer_limit, generate_greedy
from small_tokenizers import byte_level


@pytest.mark.parametrize(
    ("length", "wanted", "limit"), [(10, 6, 6), (14, 6, 6), (15, 6, 5), (19, 6, 1), (20, 6, 1)]
)
def test_an_answer_has_no_more_tokens_than_the_llm_has_positions(length, wanted, limit):
    model = make_model("concat", llm=llm_fields(max_position_embeddings=20))
    assert answer_limit(model, length, wanted) == limit


def test_answers_of_an_evaluation_end_at_the_last_position(caplog):
    """A table of positions has no row behind it: the run would end in an error after its last
    step."""
    model = make_model("concat")
    tokens = model.fusion.tokens_per_image
    encoder = ChatEncoder(use_template(byte_level(), "chatml"), tokens)
    batch = make_batch(ROWS, tokens, left=True)
    longest = batch.input_ids.shape[1]
    model.llm.config.max_position_embeddings = longest + 2
    assert generate_greedy(model, batch, 5, encoder).shape[1] <= 2
    assert f"answers end after 2 tokens: a prompt takes {longest} of" in caplog.text
