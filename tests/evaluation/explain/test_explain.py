"""Where an answer looked: against transformers' own weights, against loops, and as pictures."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn

from helpers import (
    CONNECTORS,
    CROSS_ATTENTION,
    DEEPSTACK,
    FUSIONS,
    IMAGE,
    IMAGE_SIZE,
    PLACEHOLDER,
    SHAPE_COUNTS,
    VIT,
    all_connectors,
    each,
    expand,
    llm_fields,
    make_batch,
    make_model,
    model_node,
    perturb,
)
from owlfuse.__main__ import main
from owlfuse.artifacts.export import export
from owlfuse.artifacts.hf.modeling import OwlfuseForConditionalGeneration
from owlfuse.artifacts.load import TrainedModel, make_processor, wrap
from owlfuse.config.identity import config_hash
from owlfuse.core.errors import DataError
from owlfuse.data.chat.tokenizer import load_tokenizer
from owlfuse.data.datamodule import ChatData
from owlfuse.data.formats.llava import LLaVA
from owlfuse.data.media.tiles import views_of
from owlfuse.data.shapes.write import write_shapes
from owlfuse.evaluation.explain.attention import attention_to_pictures, picture_maps
from owlfuse.evaluation.explain.contact_sheet import maps_of_answers
from owlfuse.evaluation.explain.overlays import COLORS, overlay, side_by_side
from owlfuse.evaluation.validation import Evaluation
from owlfuse.model.connectors.abstractor import Abstractor
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.multimodal import build_model, make_part
from owlfuse.parallel.ranks import Ranks
from owlfuse.serving.chat import Conversation, answer_line
from reference_lm import ReferenceLM, Shape

PROMPT = [11, IMAGE, 22, IMAGE, 23, 24]
ANSWER = [7, PLACEHOLDER, 9]  # a model may say the id of <image> too
END = 3
LLMS = {
    "llama": llm_fields("llama"),
    "mistral-window": llm_fields("mistral", sliding_window=9),
    "qwen3-wide-heads": llm_fields("qwen3", head_dim=16),
}


def wrapped(*args, **kwargs):
    """A model that no parameter's initial value makes easy."""
    model = make_model(*args, **kwargs)
    perturb(model.parameters(), 0.1)
    return OwlfuseForConditionalGeneration.wrap(model, PLACEHOLDER, {"eos_token_id": END}).eval()


def prompt_of(model, row=PROMPT):
    """What the processor would give."""
    batch = make_batch([row], model.model.fusion.tokens_per_image)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "pixel_values": batch.pixel_values,
    }


def maps(model, answer=(*ANSWER, END, END), **options):
    return attention_to_pictures(model, prompt_of(model), torch.tensor(answer), **options)


def told(model):
    """The row that tells the answer, all but its last token; which of it are images, and from
    where on each is."""
    ids, holds, starts = expand([*PROMPT, *ANSWER[:-1]], model.model.fusion.tokens_per_image)
    return ids, holds, starts


@pytest.mark.parametrize("fusion", ["concat", "modality_adaptive"])
@pytest.mark.parametrize("llm", LLMS)
@torch.no_grad()
def test_weights_among_the_text_are_those_that_transformers_gives_out(fusion, llm):
    model = wrapped(fusion, llm=LLMS[llm])
    inner, (ids, holds, _) = model.model, told(model)
    batch = make_batch([[*PROMPT, *ANSWER[:-1]]], inner.fusion.tokens_per_image)
    visual, eager = inner.encode(batch), copy.deepcopy(inner.llm)
    eager.set_attn_implementation("eager")
    embedded, arguments = inner.fusion(
        eager.get_input_embeddings()(batch.input_ids), visual, batch, batch.positions(), eager
    )
    out = eager(
        inputs_embeds=embedded,
        attention_mask=batch.attention_mask,
        output_attentions=True,
        **arguments,
    )
    for layers in (None, [1]):
        total = torch.zeros(2, 5)
        for layer in layers or range(3):
            for row in range(len(ids) - len(ANSWER), len(ids)):
                total += out.attentions[layer][0, :, row, torch.tensor(holds)].sum(0).view(2, 5)
        expected = total[:, 1:] / total[:, 1:].sum()  # without the class tokens
        got = torch.stack(maps(model, layers=layers)).flatten(1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


class LookingReference(ReferenceLM):
    """Notes of each layer and token what its heads read from the images' tokens:

    (heads, tokens).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums, self.read = [], {}

    def softmax_sum(self, query, pairs):
        scores = torch.stack([query @ key for key, _ in pairs]) / self.shape.head_width**0.5
        result = super().softmax_sum(query, pairs)
        self.sums.append((scores.softmax(0), result))
        return result

    def attend(self, layer, t, query, key, value, image_key, image_value, starts):
        self.sums = []
        out = super().attend(layer, t, query, key, value, image_key, image_value, starts)
        if any(start <= t for start in starts) and image_key:
            self.read[layer, t] = torch.stack(
                [self.head(layer, h) for h in range(self.shape.heads)]
            )
        return out

    def head(self, layer, h):
        (_, text), (cross, _), (joint, _) = self.sums[3 * h : 3 * h + 3]
        if self.fusion in ("none", "fused"):
            return cross if self.fusion == "none" else joint[: len(cross)]
        visual = f"model.layers.{layer}.self_attn.visual"
        everything = torch.cat([result for _, result in self.sums[::3]])
        gate = (
            self.project(f"{visual}.gate_proj", everything)
            if self.fusion == "adaptive"
            else self.weights[f"{visual}.gate"]
        )
        width = len(text)
        return cross * torch.sigmoid(gate[h * width : (h + 1) * width]).mean()


@each({name: node for name, node in FUSIONS.items() if "hyper" in name})
@torch.no_grad()
def test_weights_of_hyperattention_are_those_of_the_loops(node):
    fields = llm_fields("qwen3", rms_norm_eps=1e-6)
    model = wrapped(node, llm=fields).double()
    inner, (ids, holds, starts) = model.model, told(model)
    inputs = prompt_of(model)
    tokens = inner.connector(inner.vision(inputs["pixel_values"].double()))
    shape = Shape(fields["num_attention_heads"], fields["head_dim"])
    weights = dict(inner.llm.named_parameters())
    reference = LookingReference(weights, shape, node["gate"], (0, 2), node.get("mi_rope", True))
    reference.logits(ids, holds, list(tokens), starts)
    rows = [
        reference.read[layer, t]
        for layer in (0, 2)
        for t in range(len(ids) - len(ANSWER), len(ids))
    ]
    total = torch.stack(rows).mean((0, 1)).view(2, 5)[:, 1:]
    got = torch.stack(maps(model)).flatten(1).double()
    torch.testing.assert_close(got, total / total.sum(), rtol=1e-4, atol=1e-6)


class CrossReference(LookingReference):
    """The same of cross-attention, of which a head's weights count by the size of the gate."""

    def cross(self, path, t, x, images, starts):
        self.sums = []
        update = super().cross(path, t, x, images, starts)
        if self.sums:
            heads = torch.stack([weights for weights, _ in self.sums])
            size = torch.tanh(self.weights[f"{path}.visual.gate"]).abs()
            self.read[int(path.split(".")[2]), t] = heads * size
        return update


@pytest.mark.parametrize("place", ["before", "after"])
@torch.no_grad()
def test_weights_of_cross_attention_are_those_of_the_loops(place):
    node = {"_target_": CROSS_ATTENTION, "layers": [0, 2], "place": place, "qk_norm": True}
    fields = llm_fields("qwen3", rms_norm_eps=1e-6)
    model = wrapped(node, llm=fields).double()
    inner, (ids, holds, starts) = model.model, told(model)
    inputs = prompt_of(model)
    tokens = inner.connector(inner.vision(inputs["pixel_values"].double()))
    shape = Shape(fields["num_attention_heads"], fields["head_dim"])
    weights = dict(inner.llm.named_parameters())
    reference = CrossReference(weights, shape, f"cross-{place}", (0, 2))
    reference.logits(ids, holds, list(tokens), starts)
    for layers in ([0, 2], [2]):
        rows = []
        for layer in layers:
            for t in range(len(ids) - len(ANSWER), len(ids)):
                rows.append(reference.read[layer, t])
        total = torch.stack(rows).mean((0, 1)).view(2, 5)[:, 1:]
        got = torch.stack(maps(model, layers=layers)).flatten(1).double()
        torch.testing.assert_close(got, total / total.sum(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_maps_of_deepstack_are_of_the_level_that_stands_among_the_text():
    model = wrapped({"_target_": DEEPSTACK})
    found = maps(model)
    assert [picture_map.shape for picture_map in found] == [(2, 2), (2, 2)]
    assert sum(picture_map.sum().item() for picture_map in found) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_an_abstractors_tokens_are_shared_out_by_attention_rollout():
    model = Abstractor(16, 24, 6, (2, 3), queries=3, layers=2, heads=2, positions=True).eval()
    perturb(model.parameters(), 0.3)
    features = torch.randn(1, 6, 16)
    queries, reached = model.queries, torch.eye(9)[:3]  # from each query to [queries; image]
    for layer in model.layers:
        normed = layer.query_norm(queries)[0]
        keys = torch.cat([normed, layer.image_norm(features)[0]]) + torch.cat(
            [model.query_positions, model.image_positions]
        )
        rows = torch.zeros(3, 9)
        for q in range(3):
            query = layer.query(normed[q] + model.query_positions[q])
            for head in (slice(0, 8), slice(8, 16)):
                scores = torch.stack([query[head] @ layer.key(key)[head] for key in keys]) / 8**0.5
                rows[q] += scores.softmax(0) / 2
        # an image's patch stays what it is
        whole = torch.cat([rows, torch.eye(9)[3:]]) / 2 + torch.eye(9) / 2
        before = torch.cat([reached, torch.eye(9)[3:]])
        reached = (whole @ before)[:3]
        queries = layer(queries, features, model.query_positions, model.image_positions)
    expected = reached[:, 3:] / reached[:, 3:].sum(1, keepdim=True)
    got = model.patch_shares(features)[0]
    torch.testing.assert_close(got[:3], expected, rtol=1e-4, atol=1e-6)
    assert got[3].tolist() == [0.0] * 6  # the end token


@each(all_connectors())
@torch.no_grad()
def test_every_connector_says_of_which_patches_its_tokens_are_made(node):
    supplied = {"in_width": 64, "out_width": 24, "patches": 17, "grid": (4, 4)}
    connector = make_part("connector", {"connector": node}, **supplied)
    shares = connector.patch_shares(torch.randn(2, 17, 64))
    assert shares.shape == (2, connector.tokens, 17)
    sums = shares.sum(-1).round(decimals=4).unique().tolist()
    assert sums in ([1.0], [0.0, 1.0])  # an end token has nothing of the picture


PAIRS = [
    *((fusion, "linear") for fusion in FUSIONS),
    ("concat", "mlp"),
    ("hyperattention-fused", "abstractor"),
]


@pytest.mark.parametrize(("fusion", "connector"), PAIRS)
def test_maps_sum_to_one_and_the_model_is_as_it_was(fusion, connector):
    model = wrapped(fusion, connector=CONNECTORS[connector])
    model.train()
    model.model.eval()  # as of a run's model that is wrapped for `chat`
    inputs, attention = prompt_of(model), model.model.llm.config._attn_implementation
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        before = model(**inputs).logits
    found = maps(model)
    assert [each.shape for each in found] == [(2, 2), (2, 2)]
    assert sum(each.sum().item() for each in found) == pytest.approx(1, abs=1e-5)
    assert min(each.min().item() for each in found) > 0
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert model.model.llm.config._attn_implementation == attention
    assert [module.training for module in model.modules()] == modes


def test_the_model_is_as_it_was_after_a_failure_too():
    model = wrapped("hyperattention-adaptive")
    attention = model.model.llm.config._attn_implementation
    handle = model.model.llm.lm_head.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        maps(model)
    handle.remove()
    assert model.model.llm.config._attn_implementation == attention
    assert maps(model)


def test_ends_of_sequence_are_no_part_of_the_answer():
    model = wrapped("concat")
    plain = maps(model, ANSWER)
    assert all(
        torch.equal(a, b) for a, b in zip(plain, maps(model, [*ANSWER, END, END]), strict=True)
    )
    assert not torch.equal(plain[0], maps(model, [*ANSWER, 8])[0])
    assert len(maps(model, [END])) == 2  # nothing was said: where it looked before it ended


def test_padding_before_a_prompt_changes_nothing():
    model = wrapped("concat")
    inputs = prompt_of(model)
    padded = {
        name: torch.nn.functional.pad(inputs[name], (4, 0))
        for name in ("input_ids", "attention_mask")
    }
    again = attention_to_pictures(model, {**inputs, **padded}, torch.tensor(ANSWER))
    torch.testing.assert_close(again, maps(model), rtol=1e-4, atol=1e-6)


def backbone(name, **kwargs):
    return {
        "_target_": "owlfuse.model.vision.backbone.TimmBackbone",
        "name": name,
        "image_size": 64,
        **kwargs,
    }


SMALL = {
    "convnext": backbone("convnext_atto", kwargs={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}),
    "swin": backbone(
        "swin_tiny_patch4_window7_224",
        kwargs={"depths": [1, 1, 1, 1], "embed_dim": 12, "window_size": 2},
    ),
    "two-class-tokens": backbone(
        "deit_tiny_distilled_patch16_224", kwargs={"embed_dim": 16, "depth": 1, "num_heads": 2}
    ),
    "no-class-token": {**VIT, "class_token": False, "image_size": 64},
}
GRIDS = {"convnext": (2, 2), "swin": (2, 2), "two-class-tokens": (4, 4), "no-class-token": (4, 4)}


@pytest.mark.parametrize("name", SMALL)
def test_the_grid_is_the_backbones_own(name):
    model = wrapped("concat", vision=SMALL[name])
    inputs = prompt_of(model)
    inputs["pixel_values"] = torch.randn(2, 3, 64, 64)
    found = attention_to_pictures(model, inputs, torch.tensor(ANSWER))
    assert [each.shape for each in found] == [GRIDS[name]] * 2
    assert sum(each.sum().item() for each in found) == pytest.approx(1, abs=1e-5)


class FirstThree(LinearConnector):
    """Does not say of which patches its tokens are."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.tokens = 3

    def forward(self, features):
        return super().forward(features[:, :3])


def test_what_cannot_be_explained_is_told_with_what_was_found():
    model = wrapped("hyperattention-static")
    inputs = prompt_of(model)
    for changed, message in (
        ({"pixel_values": None}, "the prompt has no picture"),
        ({"input_ids": inputs["input_ids"].expand(2, -1)}, "2 prompts"),
    ):
        with pytest.raises(DataError, match=message):
            attention_to_pictures(model, {**inputs, **changed}, torch.tensor(ANSWER))
    with pytest.raises(DataError, match="has no token"):
        maps(model, [])
    with pytest.raises(DataError, match=r"layers \[1\]: text attends to pictures in \[0, 2\]"):
        maps(model, layers=[1])
    odd = wrapped(
        "concat",
        vision=backbone(
            "hiera_tiny_224", kwargs={"embed_dim": 8, "stages": [1, 1, 1, 1], "img_size": [64, 64]}
        ),
    )
    inputs = prompt_of(odd)
    inputs["pixel_values"] = torch.randn(2, 3, 64, 64)
    with pytest.raises(DataError, match="4 tokens of Hiera are a rectangle"):
        attention_to_pictures(odd, inputs, torch.tensor(ANSWER))
    with pytest.raises(DataError, match="further back than the LLM's attention reaches"):
        maps(wrapped("concat", llm=llm_fields("mistral", sliding_window=2)))
    connector = {"_target_": f"{__name__}.FirstThree"}
    mute = wrapped("concat", connector=connector)
    with pytest.raises(DataError, match="FirstThree makes 3 tokens of 5 patches"):
        maps(mute)


def test_an_overlay_has_the_pictures_size_and_is_lightest_where_most_weight_is():
    picture = Image.new("RGB", (75, 40), (200, 30, 30))
    seen = overlay(picture, torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.6, 0.1]]))
    assert (seen.size, seen.mode) == (picture.size, "RGB")
    values = np.asarray(seen).astype(int)
    # a patch is a block
    assert len({tuple(values[y, x]) for x in range(26, 49) for y in range(21, 40)}) == 1
    top = [round(255 * c) for c in colormaps[COLORS](1.0)[:3]]
    distance = np.abs(values - np.array(top)).sum(-1)
    assert np.unravel_index(distance.argmin(), distance.shape)[0] >= 20
    assert 25 <= distance.argmin(1)[30] < 50
    assert overlay(picture, torch.zeros(2, 2)).size == picture.size


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "shapes"
    write_shapes(str(folder), **SHAPE_COUNTS)
    return folder


def trained_on(shapes, fusion="hyperattention-adaptive", **kwargs):
    """A random model with the shapes' own tokenizer."""
    tokenizer = load_tokenizer(str(shapes / "tokenizer"))
    torch.manual_seed(0)
    return TrainedModel(
        build_model(model_node(fusion, **kwargs), len(tokenizer))[0].eval(), tokenizer, None
    )


def test_views_of_a_tiled_picture_lie_over_the_part_that_they_show(shapes):
    processor = make_processor(trained_on(shapes))
    processor.tile = True
    picture = Image.new("RGB", (70, 40))
    views = views_of(picture, (IMAGE_SIZE, IMAGE_SIZE))
    assert len(views) == 7  # a global view, and 2 rows of 3
    empty = torch.zeros(2, 2)
    for view in range(7):
        maps = [torch.full((2, 2), 1 / 4) if i == view else empty for i in range(7)]
        (whole,) = picture_maps(processor, [picture], maps)
        assert whole.shape == (4, 6)
        assert whole.sum().item() == pytest.approx(1)
        row, column = divmod(view - 1, 3)
        part = whole if view == 0 else whole[2 * row :][:2, 2 * column :][:, :2]
        assert part.sum().item() == pytest.approx(1)
    small = Image.new("RGB", (1, 1))
    assert len(picture_maps(processor, [small, picture], [empty] * 8)) == 2


def test_a_conversation_explains_its_last_answer(shapes):
    trained = trained_on(shapes)
    conversation = Conversation(
        wrap(trained), make_processor(trained), max_new_tokens=4, do_sample=False
    )
    with pytest.raises(DataError, match="nothing was asked"):
        conversation.explain()
    conversation.ask("Hello", lambda text: None)
    with pytest.raises(DataError, match="no picture"):
        conversation.explain()
    sizes = []
    for number in range(2):
        conversation.show(str(shapes / "images" / "val" / f"00000{number}.png"))
        conversation.ask("What color is the circle?", lambda text: None)
        sizes.append(conversation.explain().size)
    assert sizes[1][0] > sizes[0][0]  # of two pictures by now
    _, inputs, ids = conversation.last
    with torch.inference_mode():
        again = conversation.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.tolist() == again[0, inputs["input_ids"].shape[1] :].tolist()


def test_chat_writes_where_the_answer_looked(shapes, tmp_path, capsys):
    export(trained_on(shapes), tmp_path / "out")
    picture, out = str(shapes / "images" / "val" / "000000.png"), tmp_path / "seen.png"
    asked = ["chat", str(tmp_path / "out"), "--max-new-tokens", "3", "--explain", str(out)]
    assert main([*asked, "--image", picture, "What color is it?"]) == 0
    assert f"where it looked is in {out}" in capsys.readouterr().err
    with Image.open(out) as seen:
        seen = np.asarray(seen.convert("RGB")).astype(int)
    with Image.open(picture) as shown:
        color = np.asarray(shown.convert("RGB"))[0, 0].astype(int)
    assert (np.abs(seen - color).sum(-1) == 0).mean() > 0.1  # the picture itself stands there too


def test_a_conversation_writes_where_it_looked_once_a_picture_is_shown(shapes, tmp_path, capsys):
    trained, out = trained_on(shapes), tmp_path / "seen.png"
    conversation = Conversation(
        wrap(trained), make_processor(trained), max_new_tokens=3, do_sample=False
    )
    answer_line(conversation, "Hello", out)
    assert not out.exists()
    answer_line(conversation, f"/image {shapes / 'images' / 'val' / '000000.png'}", out)
    answer_line(conversation, "What color is it?", out)
    assert capsys.readouterr().err == f"(where it looked is in {out})\n"
    with Image.open(out) as seen:
        assert seen.width > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--explain", "seen.txt", "--image", "a.png", "What?"],
            "seen.txt: a picture is written as .png",
        ),
        (
            ["--explain", "nowhere/seen.png", "--image", "a.png", "What?"],
            "there is no folder nowhere",
        ),
        (["--explain", "seen.png", "What?"], "give one by --image"),
    ],
)
def test_what_chat_cannot_explain_is_told_before_a_model_is_loaded(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "no_such_folder", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def evaluated(shapes, folder, model, tile=0.0, file="val.json", **options):
    """An evaluation, its answers and metrics, and the size of its contact sheet."""
    validation = {"val": LLaVA(file=str(shapes / file), tile=tile)}
    data = ChatData(
        str(shapes / "tokenizer"),
        {"val": LLaVA(file=str(shapes / "val.json"))},
        validation,
        workers=0,
    )
    data.bind(model.vision.preprocessing, model.fusion.tokens_per_image)
    evaluation = Evaluation(
        max_questions=6, max_new_tokens=3, blank=False, contact_sheet=2, decode_tokens=0, **options
    )
    metrics, answers = evaluation(model, data, folder)
    evaluation.write(folder, metrics, answers, "title")
    with Image.open(folder / "contact_sheet.png") as sheet:
        return evaluation, (metrics, answers), sheet.size


def test_a_contact_sheet_has_overlays_where_they_are_asked_for(shapes, tmp_path, caplog):
    model = trained_on(shapes, "concat").model
    _, results, plain = evaluated(shapes, tmp_path, model)
    evaluation, again, explained = evaluated(shapes, tmp_path, model, explain=True)
    assert again == results
    assert explained[0] == 2 * plain[0]
    assert [map.shape for map in evaluation.maps.values()] == [(2, 2)] * 2
    assert config_hash({"evaluation": {"explain": True}}) == config_hash({"evaluation": {}})
    model.vision.grid = (1, 5)  # as of a backbone whose tokens are no grid
    with caplog.at_level(logging.WARNING):
        assert evaluated(shapes, tmp_path, model, explain=True)[2] == plain
    assert "contact sheet has no overlays: vision: timm does not tell" in caplog.text


def test_another_rank_that_has_failed_ends_this_one():
    """Its error is no reason to go on without overlays: it would be waited for."""

    class SecondRank(Ranks):
        def deal(self, *work):
            raise DataError("rank 0 has failed: RuntimeError: out of memory")

    with pytest.raises(DataError, match="rank 0 has failed"):
        maps_of_answers(nn.Module(), None, [], 1, SecondRank(1, 2))


def test_the_overlay_of_a_tiled_picture_is_as_fine_as_its_tiles(shapes, tmp_path):
    evaluation, _, _ = evaluated(shapes, tmp_path, trained_on(shapes).model, tile=1.0, explain=True)
    # 2 x 2 tiles of 2 x 2 patches
    assert [map.shape for map in evaluation.maps.values()] == [(4, 4)] * 2
    assert [map.sum().item() for map in evaluation.maps.values()] == pytest.approx([1, 1])


def test_of_several_pictures_the_last_is_shown_and_explained(shapes, tmp_path):
    first, second = (
        record["image"] for record in json.loads((shapes / "val.json").read_text())[:2]
    )
    turns = [
        {"from": "human", "value": "<image>\nLike <image>?"},
        {"from": "gpt", "value": "no"},
    ]
    record = {"id": "two", "image": [first, second], "conversations": turns}
    (shapes / "two.json").write_text(json.dumps([record]))
    evaluation, (_, answers), _ = evaluated(
        shapes, tmp_path, trained_on(shapes).model, file="two.json", explain=True
    )
    assert [answer.image for answer in answers] == [str(shapes / second)]
    assert [map.shape for map in evaluation.maps.values()] == [(2, 2)]


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000)])
def test_a_strip_is_drawn_with_at_least_a_pixel(size):
    drawn = side_by_side([Image.new("RGB", size)], [torch.full((2, 2), 0.25)], "Q", "A")
    assert min(drawn.size) > 1
