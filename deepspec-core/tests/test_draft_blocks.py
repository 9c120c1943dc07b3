"""The blocks every draft composes: attention steps, the residual layout, initial weights, published names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepspec_core.checkpoints.published import layer_names, published_name
from deepspec_core.contracts.target import AttentionProjections, LayerNorms
from deepspec_core.layers.attention import DraftAttention, rotate
from deepspec_core.layers.decoder_layer import DraftLayer, initialise

HEADS, KV_HEADS, HEAD_DIM, WIDTH, HIDDEN = 4, 2, 6, 20, 10


class _Times(nn.Module):
    """A module whose place in a formula shows in the result."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor([factor]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _Adapter:
    """Just enough of an adapter for a layer."""

    class architecture:
        hidden_size = HIDDEN

    def attention_projections(self, in_features: int) -> AttentionProjections:
        return _projections(in_features, own_values=True)

    def layer_norms(self) -> LayerNorms:
        return LayerNorms(
            before_attention=_Times(2.0),
            after_attention=_Times(3.0),
            before_mlp=_Times(5.0),
            after_mlp=_Times(7.0),
            output_scale=_Times(11.0),
            names={"before_attention": "first.weight", "output_scale": "scalar"},
        )

    def mlp(self) -> nn.Module:
        return _Times(13.0)


def _projections(in_features: int, *, own_values: bool, **norms: nn.Module) -> AttentionProjections:
    return AttentionProjections(
        query=nn.Linear(in_features, HEADS * HEAD_DIM),
        key=nn.Linear(in_features, KV_HEADS * HEAD_DIM, bias=False),
        value=nn.Linear(in_features, KV_HEADS * HEAD_DIM, bias=False) if own_values else None,
        out=nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False),
        scale=0.5,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        names={"query": "q_proj", "out": "o_proj"},
        **norms,
    )


def _rotary(*shape: int) -> tuple[Tensor, Tensor]:
    angles = torch.rand(*shape, HEAD_DIM // 2).repeat_interleave(1, -1)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def test_rotation_turns_pairs_of_halves() -> None:
    x, (cos, sin) = torch.randn(2, 3, 5, HEAD_DIM), _rotary(2, 5)
    found = rotate(x, (cos, sin))
    half = HEAD_DIM // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None, :, :half]
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1))


def test_attention_steps_compose_to_grouped_attention() -> None:
    torch.manual_seed(0)
    attention = DraftAttention(_projections(WIDTH, own_values=True))
    x, rotary = torch.randn(2, 5, WIDTH), _rotary(2, 5)
    q, (k, v) = attention.queries(x, rotary), attention.keys_values(x, rotary)
    assert q.shape == (2, HEADS, 5, HEAD_DIM)
    assert k.shape == v.shape == (2, KV_HEADS, 5, HEAD_DIM)
    found = attention.combine(F.scaled_dot_product_attention(q, k, v, scale=attention.scale, enable_gqa=True))
    expected = torch.zeros(2, 5, HEADS * HEAD_DIM)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        of_group = slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
        one_q = rotate(attention.query(x)[..., rows][:, None], rotary)[:, 0]
        one_k = rotate(attention.key(x)[..., of_group][:, None], rotary)[:, 0]
        scores = one_q @ one_k.transpose(1, 2) * 0.5
        assert attention.value is not None
        expected[..., rows] = scores.softmax(-1) @ attention.value(x)[..., of_group]
    torch.testing.assert_close(found, attention.out(expected))


def test_values_from_keys_are_taken_before_norm_and_rotation() -> None:
    torch.manual_seed(0)
    attention = DraftAttention(
        _projections(WIDTH, own_values=False, key_norm=_Times(2.0), value_norm=_Times(3.0), query_norm=_Times(5.0))
    )
    x, rotary = torch.randn(4, WIDTH), _rotary(4)
    keys, values = attention.keys_values(x, rotary)
    raw = attention.key(x).reshape(4, KV_HEADS, HEAD_DIM).transpose(0, 1)
    torch.testing.assert_close(values, 3 * raw)
    torch.testing.assert_close(keys, rotate(2 * raw, rotary))
    torch.testing.assert_close(
        attention.queries(x, rotary), rotate(5 * attention.query(x).reshape(4, HEADS, HEAD_DIM).transpose(0, 1), rotary)
    )


def test_layer_has_the_residual_layout_it_says() -> None:
    adapter: Any = _Adapter()
    layer, hidden = DraftLayer(adapter), torch.randn(2, 3, HIDDEN)
    residual = hidden + 3 * (2 * hidden + 1)
    expected = 11 * (residual + 7 * 13 * 5 * residual)
    torch.testing.assert_close(layer(hidden, lambda x: x + 1), expected)
    torch.testing.assert_close(layer.finish(hidden, 2 * hidden + 1), expected)


class _Between(nn.Module):
    """A sublayer between two factors."""

    def __init__(self, before: float, after: float) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, sublayer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: self.after * sublayer(self.before * x)


def test_a_module_around_a_sublayer_stands_inside_the_norms() -> None:
    adapter: Any = _Adapter()
    layer, x = DraftLayer(adapter), torch.ones(1, HIDDEN)
    assert not [name for name in layer.state_dict() if "around" in name]
    layer.around_attention, layer.around_mlp = _Between(17.0, 19.0), _Between(23.0, 29.0)
    attended = []
    found = layer(x, lambda given: attended.append(given) or given + 1.0)  # type: ignore[func-returns-value]
    assert torch.equal(attended[0], x * 2 * 17)
    residual = x + 3 * 19 * (x * 2 * 17 + 1)
    torch.testing.assert_close(found, 11 * (residual + 7 * 29 * 13 * 23 * 5 * residual))


def test_attention_input_may_be_wider_than_the_residual() -> None:
    adapter: Any = _Adapter()
    layer = DraftLayer(adapter, attention_input=2 * HIDDEN)
    assert layer.attention.query.in_features == 2 * HIDDEN
    assert layer.attention.out.out_features == HIDDEN


def test_names_come_from_the_family_longest_prefix_first() -> None:
    adapter: Any = _Adapter()
    names = layer_names([DraftLayer(adapter)], under="body.layers")
    published = {
        "body.layers.0.attention.query.weight": "layers.0.self_attn.q_proj.weight",
        "body.layers.0.attention.query.bias": "layers.0.self_attn.q_proj.bias",
        "body.layers.0.before_attention.factor": "layers.0.first.weight",
        "body.layers.0.output_scale.factor": "layers.0.scalar",
        "body.layers.0.mlp.up.weight": "layers.0.mlp.up.weight",
        "body.layersome": "body.layersome",
    }
    assert {name: published_name(name, names) for name in published} == published


def test_new_weights() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(200, 200), nn.LayerNorm(200), nn.Embedding(50, 200))
    initialise(module, 0.02)
    linear, norm, embedding = module
    assert abs(linear.weight.std().item() - 0.02) < 1e-3
    assert abs(embedding.weight.std().item() - 0.02) < 1e-3
    assert not linear.bias.any()
    assert (norm.weight == 1).all()
