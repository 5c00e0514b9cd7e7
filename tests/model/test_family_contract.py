"""Every family of LLMs times every fusion of a yaml: it works, or is refused in one line, as the
page `docs/families.md` says."""

import copy
import sys

import pytest
import torch
from transformers import DynamicCache

from families import small_fields
from helpers import IMAGE, REPO, VOCAB, backbone_for, make_batch, visual_tokens
from owlfuse.model.connectors.base import Connector
from owlfuse.model.llm import cache_argument, load_llm, width
from owlfuse.model.llm_probe import randomize
from owlfuse.model.multimodal import MultimodalLM, make_part

sys.path.insert(0, str(REPO / "docs"))
import family_table

sys.path.remove(str(REPO / "docs"))

TOKENS = 3
NODES = family_table.fusion_nodes()
DOCUMENTED = family_table.documented()
FAST = ("phi3", "gpt2", "olmo2", "gemma2", "nemotron", "bloom")
"""A fused projection, transposed weights, norms behind, eager attention, an attention without
keyword arguments, positions of the mask alone."""
HEADS = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_heads": 6,
    "n_head": 6,
    "n_heads": 6,
    "hidden_size": 96,
    "n_embd": 96,
    "d_model": 96,
    "attention_hidden_size": 192,
    "word_embed_proj_dim": 96,
    "embedding_size": 96,
}
"""Others than in the page's configurations."""
HEADS_OF_FAMILY = {
    "bamba": {"mamba_n_heads": 12},
    "diffllama": {"num_key_value_heads": 2},
    "dory": {"num_key_value_heads": 2},
    "granitemoehybrid": {"mamba_n_heads": 12},
}
"""What fits together in a family only with other sizes than HEADS."""


def cases():
    """Families by seeds: three of FAST, of which the first is fast, and one of the others."""
    for family in sorted(DOCUMENTED):
        for seed in (0, 1, 2) if family in FAST else (0,):
            fast = family in FAST and seed == 0
            yield pytest.param(
                family, seed, marks=[] if fast else [pytest.mark.slow], id=f"{family}-{seed}"
            )


def fields_with_heads(family):
    fields = small_fields(family)
    changed = {name: HEADS.get(name, size) for name, size in fields.items()}
    # latent attention has no groups
    heads = fields.get("num_attention_heads")
    if heads is not None and fields.get("num_key_value_heads") == heads:
        changed["num_key_value_heads"] = changed["num_attention_heads"]
    return {**changed, **HEADS_OF_FAMILY.get(family, {})}


def build(family, kind, seed):
    """The model, its fusion's weights random, and the LLM as it was before."""
    torch.manual_seed(seed)
    llm = load_llm(VOCAB, config=fields_with_heads(family)).eval()
    plain = copy.deepcopy(llm)
    fusion = make_part("fusion", {"fusion": NODES[kind]}, connector_tokens=TOKENS)
    model = MultimodalLM(backbone_for(NODES[kind]), Connector(), fusion, llm).eval()
    with torch.no_grad():
        for module in (fusion, *fusion.owned(llm)):
            randomize(module)
    return model, plain


@pytest.mark.parametrize("kind", NODES)
@pytest.mark.parametrize(("family", "seed"), cases())
@pytest.mark.fast_cases(15)
def test_a_fusion_keeps_its_promises_or_is_refused_in_one_line(family, seed, kind):
    if not DOCUMENTED[family][kind]:
        # without memory: BLT has four models inside
        with pytest.raises(ValueError) as refusal, torch.device("meta"):  # noqa: PT011
            build(family, kind, seed)
        assert "\n" not in str(refusal.value)
        return
    model, plain = build(family, kind, seed)
    rows = [[11, 12, IMAGE, 13, IMAGE, 14, 15], [21, 22, 23, 24]]
    batch = make_batch(rows, model.fusion.tokens_per_image)
    tokens = torch.randn(2, TOKENS, width(model.llm))
    check_pictures(model, batch, tokens)
    check_text(model, plain, batch, tokens, rows[1])
    check_cache(model, tokens[:1])
    check_gradients(model, plain, batch, tokens, rows[1])


@torch.no_grad()
def check_pictures(model, batch, tokens):
    """The second picture changes logits behind its start and none before."""
    before = model(batch, visual_tokens(batch, tokens))
    after = model(batch, visual_tokens(batch, torch.stack([tokens[0], -tokens[1]])))
    scale = before.abs().max()
    second = int(batch.image_positions[0, 1])
    assert (after[0, :second] - before[0, :second]).abs().max() <= 1e-4 * scale
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-4 * scale


@torch.no_grad()
def check_text(model, plain, batch, tokens, text):
    """A row of text alone has the logits of the LLM without the fusion."""
    logits = model(batch, visual_tokens(batch, tokens))[1, : len(text)]
    expected = plain(
        input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text)), use_cache=False
    )
    scale = expected.logits.abs().max()
    assert (logits - expected.logits[0]).abs().max() <= 1e-3 * scale


@torch.no_grad()
def check_cache(model, tokens):
    """The last logits of a row are the same when all before stands in a cache."""
    row = [11, 12, IMAGE, 13, 14, 15]
    whole = make_batch([row], model.fusion.tokens_per_image)
    visual = visual_tokens(whole, tokens)
    expected = model(whole, visual)[0, -1]
    cache = DynamicCache(config=model.llm.config)
    visual.kv_cache = {}
    model(make_batch([row[:-1]], model.fusion.tokens_per_image), visual, cache)
    step = make_batch([row], model.fusion.tokens_per_image)
    step.input_ids, step.placeholder = step.input_ids[:, -1:], step.placeholder[:, -1:]
    assert cache_argument(model.llm) in ("cache", "past_key_values")
    logits = model(step, visual, cache)[0, -1]
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()


def check_gradients(model, plain, batch, tokens, text):
    """Gradients reach every parameter of the fusion, the visual tokens, and all of the LLM that
    the plain LLM's own loss reaches."""
    tokens = tokens.clone().requires_grad_()
    model(batch, visual_tokens(batch, tokens)).float().square().mean().backward()
    assert tokens.grad.abs().sum() > 0
    plain(input_ids=torch.tensor([text])).logits.float().square().mean().backward()
    # Gemma 3n looks up its own vision embeddings for text, too, and takes none of them
    reached = {name for name, p in plain.named_parameters() if p.grad is not None and p.grad.any()}
    for name, parameter in model.llm.named_parameters():
        if name in reached:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    for module in (model.fusion, *model.fusion.owned(model.llm)):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("family", family_table.FAMILIES)
def test_the_page_says_what_is_so(family):
    works = {name: reason is None for name, reason in family_table.outcomes(family).items()}
    assert DOCUMENTED[family] == works


def test_the_page_has_every_fusion():
    assert DOCUMENTED, "docs/families.md is missing: run python docs/family_table.py"
    for row in DOCUMENTED.values():
        assert list(row) == list(NODES)
