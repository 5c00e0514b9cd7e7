"""Answers of an evaluation."""

import pytest

from helpers import ROWS, llm_fields, make_batch, make_model, model_node
from owlfuse.data.chat.encoder import ChatEncoder
from owlfuse.data.chat.tokenizer import use_template
from owlfuse.evaluation.generation import answer_limit, generate_greedy
from owlfuse.model.multimodal import build_model
from small_tokenizers import byte_level


@pytest.mark.parametrize(
    ("length", "wanted", "limit"), [(10, 6, 6), (14, 6, 6), (15, 6, 5), (19, 6, 1), (20, 6, 1)]
)
def test_an_answer_has_no_more_tokens_than_the_llm_has_positions(length, wanted, limit):
    model = make_model("concat", llm=llm_fields(max_position_embeddings=20))
    assert answer_limit(model, length, wanted) == limit


def test_an_answer_ends_at_its_own_last_position_and_not_at_another_rows(caplog):
    tokens = make_model("concat").fusion.tokens_per_image
    encoder = ChatEncoder(use_template(byte_level(), "chatml"), tokens)
    # padding behind a row that has ended needs an embedding
    model = build_model(model_node("concat"), len(encoder.tokenizer))[0].eval()
    batch = make_batch(ROWS, tokens, left=True)
    unlimited = generate_greedy(model, batch, 5, encoder)
    assert not caplog.text
    lengths = batch.attention_mask.sum(1).tolist()
    longest = max(lengths)
    positions = model.llm.config.max_position_embeddings = longest + 2
    # a table of positions has no row behind its last: the run would end in an error
    read = []
    hook = model.llm.register_forward_pre_hook(
        lambda llm, _, given: read.append(int(given["position_ids"].max())), with_kwargs=True
    )
    limited = generate_greedy(model, batch, 5, encoder)
    hook.remove()
    assert max(read) < positions
    assert f"the longest prompt takes {longest} of the LLM's {positions} positions" in caplog.text
    limits = [min(5, positions - length) for length in lengths]
    assert 2 in limits
    assert 5 in limits
    for row, expected, limit in zip(limited, unlimited, limits, strict=True):
        assert row[:limit].tolist() == expected[:limit].tolist()
        assert set(row[limit:].tolist()) <= {encoder.pad_id}
