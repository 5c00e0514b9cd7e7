"""Tokenizer and LLM fit, and tokens that the LLM does not know are trained."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers import (
    VOCAB,
    all_fusions,
    llm_fields,
    loss_of,
    make_batch,
    make_model,
    model_node,
    policy,
)
from owlfuse.model.llm import load_llm
from owlfuse.model.multimodal import build_model
from owlfuse.model.new_tokens import check_same_tokens, tokens_to_train, unknown_tokens
from owlfuse.parallel.sharding import zero_other_rows
from owlfuse.training.cost import Cost
from owlfuse.training.optim import AdamWCosine, MuonCosine

KNOWN = 40
NEW = {"<|im_start|>": 12, "<|im_end|>": 41}
"""One in a row that the weights have without a meaning, one behind them."""
POLICIES = {
    "lora": policy("LoRA", r=2),
    "frozen": policy("Frozen"),
    "last_n": policy("LastN", n=1),
    "full": policy("Full"),
}
ROWS = [[12, 11, "image", 13, 41, 14], [12, 21, 22, 41, 15]]


def pretrained(folder, tied):
    torch.manual_seed(0)
    load_llm(KNOWN, config=llm_fields("qwen2", tie_word_embeddings=tied)).save_pretrained(folder)
    return str(folder)


def tokenizer_of(words, folder=None, added=()):
    vocabulary = {word: index for index, word in enumerate(words)}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    )
    made.add_tokens(list(added), special_tokens=True)
    if folder is not None:
        made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", [AdamWCosine, MuonCosine])
@pytest.mark.fast_cases(6)
def test_of_a_table_that_is_not_trained_only_the_new_rows_change(tied, name, kind, tmp_path):
    node = model_node(adapter={"llm": POLICIES[name]}, pretrained=pretrained(tmp_path, tied))
    model, summaries = build_model(node, VOCAB, new_tokens=NEW)
    before = copy.deepcopy(model.llm.state_dict())
    optimizer = kind(lr=0.1, weight_decay=0.5, layer_decay={}).optimizer(
        kind(lr=0.1, weight_decay=0.5).groups(model)
    )
    for _ in range(3):
        batch = make_batch(ROWS, model.fusion.tokens_per_image)
        optimizer.zero_grad()
        loss_of(model(batch), batch).backward()
        for table, rows in model.row_limits():
            zero_other_rows(table, rows)
        optimizer.step()
    after = model.llm.state_dict()
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[table] != before[table]).any(1).nonzero().flatten().tolist()
        assert set(NEW.values()) <= set(moved)
        assert name == "full" or set(moved) == set(NEW.values())
    tables = 1 if tied else 2
    rows = {"lora": 2, "frozen": 2, "last_n": 2, "full": VOCAB}[name]
    trained = sum(
        p.numel()
        for n, p in model.llm.named_parameters()
        if p.requires_grad and n not in model.new_rows
    )
    limited = 0 if name == "full" else tables * rows * 32
    assert next(s for s in summaries if s.part == "llm").trained == trained + limited


@pytest.mark.parametrize("name", ["lora", "frozen", "last_n"])
def test_a_model_built_by_hand_trains_the_rows_behind_the_pretrained_ones(name, tmp_path):
    node = model_node(adapter={"llm": POLICIES[name]}, pretrained=pretrained(tmp_path, tied=False))
    model, _ = build_model(node, KNOWN + 3)
    assert set(model.new_rows) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert model.new_rows["lm_head.weight"] == [KNOWN, KNOWN + 1, KNOWN + 2]
    assert build_model(node, KNOWN)[0].new_rows == {}
    assert build_model(model_node(adapter={"llm": POLICIES[name]}), KNOWN)[0].new_rows == {}


WORDS = ["<unk>", "red", "blue", "green"]


def test_new_are_the_tokens_that_the_llms_own_tokenizer_lacks_or_that_lie_behind_its_rows():
    own = tokenizer_of(WORDS)
    longer = tokenizer_of(WORDS, added=["<|im_start|>", "<image>", "<|im_end|>"])
    assert unknown_tokens(longer, own, rows=64) == {"<|im_start|>": 4, "<|im_end|>": 6}
    assert unknown_tokens(longer, longer, rows=5) == {"<|im_end|>": 6}
    assert unknown_tokens(longer, longer, rows=None) == {}


def test_the_image_token_is_new_where_its_own_embedding_is_read():
    own = tokenizer_of(WORDS)
    longer = tokenizer_of(WORDS, added=["<image>"])
    assert unknown_tokens(longer, own, rows=64) == {}
    assert unknown_tokens(longer, own, rows=64, splices=False) == {"<image>": 4}
    for name, node in all_fusions().items():
        model = make_model(node)
        batch = make_batch(ROWS, model.fusion.tokens_per_image)
        table = model.llm.get_input_embeddings().weight
        loss_of(model.eval()(batch), batch).backward()
        reads = bool(table.grad[batch.input_ids[batch.placeholder][0]].any())
        assert reads != model.fusion.splices, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["<unk>", "red", "green", "blue"], "token 2 is 'green', and 'blue' there"),
        (["<unk>", "rot"], "token 1 is 'rot', and 'red' there"),
        (["<unk>", "red", "blue", "green", "more"], None),
        (["<unk>", "red"], None),
    ],
)
@pytest.mark.parametrize("start", ["init_from", "pretrained"])
def test_another_tokenizer_than_that_of_the_weights_is_refused_by_the_first_token_that_differs(
    words, message, start, tmp_path
):
    tokenizer_of(WORDS, tmp_path / "weights")
    tokenizer = tokenizer_of(words, tmp_path / "data")
    init_from, llm = (
        (str(tmp_path / "weights"), {})
        if start == "init_from"
        else (None, {"pretrained": str(tmp_path / "weights")})
    )
    if message is None:
        tokens_to_train(tokenizer, str(tmp_path / "data"), init_from, llm, None)
        return
    with pytest.raises(ValueError, match=message) as refusal:
        tokens_to_train(tokenizer, str(tmp_path / "data"), init_from, llm, None)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "data") in str(refusal.value)
    assert str(tmp_path / "weights") in str(refusal.value)
    check_same_tokens(tokenizer, "one", tokenizer, "itself")


def test_weights_without_a_tokenizer_are_taken_to_know_the_datas_and_random_ones_nothing(tmp_path):
    (tmp_path / "weights").mkdir()
    tokenizer_of(WORDS, tmp_path / "data")
    tokenizer = tokenizer_of(WORDS, added=["<|im_end|>"])
    llm = {"pretrained": str(tmp_path / "weights")}
    assert tokens_to_train(tokenizer, str(tmp_path / "data"), None, llm, 64) == {"<|im_end|>": 4}
    assert tokens_to_train(tokenizer, str(tmp_path / "data"), None, {"config": {}}, None) == {}


def test_the_cost_of_a_run_counts_the_rows_that_are_trained(tmp_path, monkeypatch):
    node = model_node(
        adapter={"llm": POLICIES["lora"]}, pretrained=pretrained(tmp_path, tied=False)
    )
    model, summaries = build_model(node, VOCAB, new_tokens=NEW)
    cost = Cost()
    monkeypatch.setattr("owlfuse.training.cost.data_ranks", lambda trainer: 1)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=False)
    cost.on_fit_end(trainer, SimpleNamespace(model=model))
    assert cost.cost["trained_parameters"] == sum(part.trained for part in summaries)
