"""What holds for every connector, those of every yaml included, and the abstractor against the
released ones."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import REPO, all_connectors, each
from owlfuse.artifacts.released.loading import load
from owlfuse.model.connectors.abstractor import Abstractor, SwiGLU
from owlfuse.model.connectors.linear import LinearConnector
from owlfuse.model.connectors.mlp import MLPConnector
from owlfuse.model.connectors.pixel_shuffle import PixelShuffleConnector
from owlfuse.model.connectors.pool import PoolConnector
from owlfuse.model.connectors.qformer import QFormer
from owlfuse.model.connectors.resampler import Resampler
from owlfuse.model.multimodal import make_part
from owlfuse.model.positions import sincos_1d, sincos_2d, sincos_2d_spread

GOLDENS = REPO / "tests" / "goldens"

# patches and grid: square, with a class token, not square, tokens that are no grid
SHAPES = [(16, (4, 4)), (17, (4, 4)), (6, (2, 3)), (7, (1, 7))]


def connector_of(node, in_width=64, out_width=24, patches=16, grid=(4, 4)):
    supplied = {"in_width": in_width, "out_width": out_width, "patches": patches, "grid": grid}
    return make_part("connector", {"connector": node}, **supplied)


def fits(node, grid):
    """Whether a connector that joins patches takes a grid; the others take every one."""
    rows, columns = grid
    if "factor" in node:
        return rows % node["factor"] == 0 and columns % node["factor"] == 0
    return "size" not in node or (rows >= node["size"] and columns >= node["size"])


@each(all_connectors())
@pytest.mark.parametrize(("patches", "grid"), SHAPES)
def test_tokens_is_the_number_that_comes_out(node, patches, grid):
    if not fits(node, grid):
        with pytest.raises(ValueError, match=rf"grid of {grid[0]} x {grid[1]} patches"):
            connector_of(node, patches=patches, grid=grid)
        return
    connector = connector_of(node, patches=patches, grid=grid)
    assert connector(torch.randn(2, patches, 64)).shape == (2, connector.tokens, 24)


@each(all_connectors())
@torch.no_grad()
def test_at_another_grid_it_is_the_one_that_is_built_there_with_its_weights(node):
    connector = connector_of(node)
    connector.set_grid(25, (4, 6))
    fresh = connector_of(node, patches=25, grid=(4, 6))
    tables = {name: table for name, table in fresh.state_dict().items() if "positions" in name}
    fresh.load_state_dict({**connector.state_dict(), **tables})
    features = torch.randn(2, 25, 64)
    assert connector.tokens == fresh.tokens
    assert torch.equal(connector(features), fresh(features))


@each(all_connectors())
def test_every_parameter_has_a_gradient(node):
    connector = connector_of(node)
    connector(torch.randn(2, 16, 64)).square().sum().backward()
    silent = [
        n for n, p in connector.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    # a bias of the keys adds the same to every score of a query, and a softmax does not see it
    assert [name for name in silent if not name.endswith("key.bias")] == []


@each(all_connectors())
def test_an_images_tokens_do_not_depend_on_the_others_in_the_batch(node):
    connector = connector_of(node)
    features = torch.randn(3, 16, 64)
    together = connector(features)
    for n in range(3):
        torch.testing.assert_close(
            together[n], connector(features[n : n + 1])[0], rtol=1e-5, atol=1e-6
        )


@each(all_connectors())
def test_it_is_made_on_the_meta_device_with_the_same_shapes(node):
    with torch.device("meta"):
        connector = connector_of(node)
        assert connector(torch.randn(2, 16, 64)).shape == (2, connector.tokens, 24)
    assert all(p.is_meta for p in connector.parameters())


@each(all_connectors())
def test_state_is_restored_by_its_own_state_dict(node):
    first, second = connector_of(node), connector_of(node)
    features = torch.randn(1, 16, 64)
    assert not torch.equal(first(features), second(features))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(features), second(features))


def test_linear_is_one_matrix_a_patch_after_its_norm():
    connector = LinearConnector(8, 5, 3, (1, 3), norm=True)
    torch.nn.init.normal_(connector.norm.weight)
    features = torch.randn(2, 3, 8)
    for n in range(2):
        for p in range(3):
            x = features[n, p]
            normed = (x - x.mean()) / torch.sqrt(
                x.var(unbiased=False) + 1e-5
            ) * connector.norm.weight + connector.norm.bias
            expected = connector.proj.weight @ normed + connector.proj.bias
            torch.testing.assert_close(connector(features)[n, p], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp_has_gelu_between_its_layers_and_none_after(depth):
    connector = MLPConnector(8, 5, 3, (1, 3), depth=depth)
    weights = [p for n, p in connector.named_parameters()]
    assert len(weights) == 2 * depth
    features = torch.randn(2, 3, 8)
    x = features
    for k in range(depth):
        if k:
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = x @ weights[2 * k].T + weights[2 * k + 1]
    torch.testing.assert_close(connector(features), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [0, -1])
def test_an_mlp_without_layers_is_an_error(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        MLPConnector(8, 5, 3, (1, 3), depth=depth)


# Connectors that join neighbouring patches


@pytest.mark.parametrize(("factor", "grid"), [(2, (4, 6)), (3, (3, 6)), (1, (2, 3))])
def test_pixel_shuffle_puts_the_patches_of_a_cell_side_by_side_row_by_row(factor, grid):
    rows, columns = grid
    arguments = {"factor": factor, "depth": 1, "norm": False}
    connector = PixelShuffleConnector(5, 7, rows * columns + 2, grid, **arguments)
    features = torch.randn(2, rows * columns + 2, 5)
    tokens = connector(features)
    linear = connector.layers[1]
    patches = features[:, 2:].unflatten(1, grid)
    for row in range(rows // factor):
        for column in range(columns // factor):
            cell = []
            for i in range(factor):
                for j in range(factor):
                    cell.append(patches[:, row * factor + i, column * factor + j])
            expected = torch.cat(cell, dim=1) @ linear.weight.T + linear.bias
            got = tokens[:, row * (columns // factor) + column]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "size"), [((4, 6), [2, 3]), ((5, 7), 3), ((3, 4), [3, 1])])
@pytest.mark.parametrize("pool", ["before", "after"])
@torch.no_grad()
def test_pool_is_the_mean_of_the_patches_under_each_cell(grid, size, pool):
    rows, columns = grid
    connector = PoolConnector(5, 7, rows * columns + 1, grid, size=size, pool=pool)
    high, wide = [size, size] if isinstance(size, int) else size
    features = torch.randn(2, rows * columns + 1, 5)
    inputs = features if pool == "before" else connector.layers(features)
    patches = inputs[:, 1:].unflatten(1, grid)
    tokens = []
    for k in range(high):
        for m in range(wide):
            top, bottom = rows * k // high, math.ceil(rows * (k + 1) / high)
            left, right = columns * m // wide, math.ceil(columns * (m + 1) / wide)
            tokens.append(patches[:, top:bottom, left:right].mean((1, 2)))
    expected = torch.stack(tokens, dim=1)
    if pool == "before":
        expected = connector.layers(expected)
    torch.testing.assert_close(connector(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("node", ["pixel_shuffle", "pool"])
@torch.no_grad()
def test_shares_of_patches_are_those_by_which_a_linear_connector_mixes_them(node):
    if node == "pool":
        connector = PoolConnector(5, 7, 36, (5, 7), size=3, norm="none", depth=1)
        weight = connector.layers[1].weight
    else:
        connector = PixelShuffleConnector(5, 7, 25, (4, 6), norm=False, depth=1)
        weight = torch.randn(7, 5)
        connector.layers[1].weight.copy_(weight.repeat(1, 4) / 4)
    features = torch.randn(2, 36 if node == "pool" else 25, 5)
    expected = connector.patch_shares(features) @ features @ weight.T + connector.layers[1].bias
    torch.testing.assert_close(connector(features), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_shares_of_patches_in_one_layer_are_its_attention_without_that_to_the_queries():
    features = torch.randn(1, 6, 5)
    resampler = Resampler(5, 8, 6, (2, 3), queries=3, layers=1, heads=4, kv_heads=2, head_dim=3)
    layer, image = resampler.layers[0], resampler.projection(features)
    keys = layer.key(
        torch.cat([layer.image_norm(image), layer.latents_norm(resampler.latents[None])], 1)
    )
    queries = layer.query(layer.latents_norm(resampler.latents))
    expected = torch.zeros(3, 6)
    for h in range(4):
        query, key = queries[:, h * 3 : h * 3 + 3], keys[0, :, h // 2 * 3 : h // 2 * 3 + 3]
        expected += torch.softmax(query @ key.T / math.sqrt(3), dim=1)[:, :6] / 4
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(resampler.patch_shares(features)[0], expected, rtol=1e-4, atol=1e-5)

    qformer = QFormer(5, 8, 6, (2, 3), queries=3, layers=1, heads=2, width=4)
    layer, states = qformer.layers[0], qformer.query_norm(qformer.queries)
    layer = layer.cross_attention
    states = qformer.layers[0].self_attention(states, states)[0]
    expected = torch.zeros(3, 6)
    for h in range(2):
        query = layer.query(states)[:, h * 2 : h * 2 + 2]
        key = layer.key(features[0])[:, h * 2 : h * 2 + 2]
        expected += torch.softmax(query @ key.T / math.sqrt(2), dim=1) / 2
    torch.testing.assert_close(qformer.patch_shares(features)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("connector", "arguments", "message"),
    [
        (PixelShuffleConnector, {"factor": 3}, "factor is 3.*grid of 4 x 4 patches"),
        (PixelShuffleConnector, {"factor": 0}, r"factor \(0\)"),
        (PoolConnector, {"size": 5}, "size is 5 x 5.*grid of 4 x 4 patches"),
        (PoolConnector, {"size": [0, 2]}, r"size \(0 x 2\)"),
        (PoolConnector, {"size": [4]}, r"size is \[4\], expected one number or two"),
        (Abstractor, {"hidden": 0}, "hidden is 0, expected at least 1"),
        (QFormer, {"hidden": -8, "heads": 2, "width": 8}, "hidden is -8, expected at least 1"),
        (Resampler, {"hidden": 0}, "hidden is 0, expected at least 1"),
        (Resampler, {"heads": 4, "kv_heads": 3}, "kv_heads is 3.*the 4 heads"),
        (Resampler, {"layers": 0}, r"layers \(0\)"),
        (QFormer, {"heads": 5, "width": 8}, "heads is 5.*width of 8"),
        (QFormer, {"cross_every": 0}, r"cross_every \(0\)"),
    ],
)
def test_what_does_not_fit_is_refused_on_the_meta_device_in_one_line(connector, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        connector(16, 8, 16, (4, 4), **arguments)
    assert "\n" not in str(error.value)


# The abstractor


@pytest.mark.parametrize("family", ["owl1", "owl2"])
@torch.no_grad()
def test_the_abstractor_gives_the_released_tokens(family):
    io = load_file(GOLDENS / family / "io.safetensors")
    got = load(GOLDENS / family).connector(io["vision_features"])
    torch.testing.assert_close(got, io["abstractor_tokens"], rtol=0, atol=1e-5)


def test_position_tables_are_those_of_the_released_checkpoint():
    weights = load_file(GOLDENS / "owl2" / "model.safetensors")
    abstractor = Abstractor(48, 64, 17, (4, 4), queries=8, layers=2, heads=4, positions=True)
    for layer in range(2):
        attention = f"model.visual_abstractor.encoder.layers.{layer}.crossattention.attention"
        torch.testing.assert_close(
            abstractor.query_positions, weights[f"{attention}.q_pos_embed"], rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            abstractor.image_positions, weights[f"{attention}.k_pos_embed"], rtol=0, atol=1e-6
        )
    assert not any("positions" in name for name, _ in abstractor.named_parameters())


def test_position_tables_tell_column_from_row_on_a_grid_that_is_not_square():
    table = sincos_2d((2, 3), 7, 8)
    assert torch.equal(table[0], torch.zeros(8))  # the class token
    for row in range(2):
        for column in range(3):
            for i in range(2):
                angles = [column / 10000 ** (i / 2), row / 10000 ** (i / 2)]
                expected = [
                    math.sin(angles[0]),
                    math.cos(angles[0]),
                    math.sin(angles[1]),
                    math.cos(angles[1]),
                ]
                got = table[1 + row * 3 + column][[i, 2 + i, 4 + i, 6 + i]]
                torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.equal(sincos_2d((4, 4), 5, 8), sincos_1d(torch.arange(5), 8))


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (7, 5), (14, 14)])
def test_the_table_for_backbones_tells_neighbours_apart_on_a_grid_of_any_size(grid):
    patches = grid[0] * grid[1]
    table = sincos_2d_spread(grid, patches + 1, 128)
    assert torch.equal(table[0], torch.zeros(128))  # the class token
    apart = torch.cdist(table[1:], table[1:]) + 100 * torch.eye(patches)
    assert apart.min() > 6 / max(grid)  # the tables' norm is 8
    column, row = 1, 0  # angles of the first frequency, 1
    place = table[1 + row * grid[1] + column]
    expected = [math.sin(2 * math.pi * 1.5 / grid[1]), math.cos(2 * math.pi * 1.5 / grid[1])]
    expected += [math.sin(2 * math.pi * 0.5 / grid[0]), math.cos(2 * math.pi * 0.5 / grid[0])]
    torch.testing.assert_close(place[[0, 32, 64, 96]], torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_learned_slope_starts_equal_to_the_fixed_one_and_then_follows_its_number():
    torch.manual_seed(1)
    fixed = SwiGLU(8, 12, learned_slope=False, eps=1e-6)
    torch.manual_seed(1)
    learned = SwiGLU(8, 12, learned_slope=True, eps=1e-6)
    x = torch.randn(3, 8)
    torch.testing.assert_close(learned(x), fixed(x), rtol=1e-5, atol=1e-6)
    learned(x).square().sum().backward()
    assert learned.slope.grad.abs() > 0
    with torch.no_grad():
        learned.slope.fill_(2.5)
    gate, up = learned.w1(x), learned.w3(x)
    expected = learned.w2(
        F.layer_norm(
            gate / (1 + torch.exp(-2.5 * gate)) * up,
            (12,),
            learned.norm.weight,
            learned.norm.bias,
            1e-6,
        )
    )
    torch.testing.assert_close(learned(x), expected, rtol=1e-4, atol=1e-5)


def test_without_an_end_token_the_queries_alone_come_out():
    torch.manual_seed(1)
    without = Abstractor(16, 8, 4, (2, 2), queries=3, layers=1, heads=2, end_token=False)
    torch.manual_seed(1)
    abstractor = Abstractor(16, 8, 4, (2, 2), queries=3, layers=1, heads=2)
    features = torch.randn(2, 4, 16)
    assert without.tokens == 3
    assert torch.equal(without(features), abstractor(features)[:, :3])
    assert torch.equal(abstractor(features)[:, 3], abstractor.end_token[0].expand(2, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "heads is 5.*width of 16"),
        ({"queries": 0}, r"queries \(0\)"),
        ({"layers": 0}, r"layers \(0\)"),
        ({"in_width": 18, "heads": 3, "positions": True}, "divisible by 4, and it is 18"),
    ],
)
def test_arguments_that_do_not_fit_are_errors_with_their_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        Abstractor(
            **{
                "in_width": 16,
                "out_width": 8,
                "patches": 4,
                "grid": (2, 2),
                "heads": 2,
                **arguments,
            }
        )
