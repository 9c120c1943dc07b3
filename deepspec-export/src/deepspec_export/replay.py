"""What an export's draft computes, from its files alone: the forward pass of an engine, in plain tensor operations.

Knows the mathematics of the three algorithms on Qwen3's and Llama's layers; reads no code of this project's drafts, so
that a mistake there is not made twice. One sequence, fp32, no cache.

Legend: T context tokens, S slots of a block, K proposals, H hidden size, h query heads, G kv heads, D head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import field, frozen
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deepspec_export.served import OFFSETS, Served


@frozen(kw_only=True, eq=False)
class Round:
    """What a draft is given in one round, and the tokens that it proposed.

    prompt_T, first: The prompt, and the token after it, at position T. features: [T, H] of each tapped layer, by its
    zero-based number. proposed_K: The tokens that this project's draft drew.
    """

    prompt_T: Tensor
    first: int
    features: Mapping[int, Tensor]
    proposed_K: Tensor


@frozen(kw_only=True, eq=False)
class Distributions:
    """log_probabilities [K, V] of each proposal given those before it; confidence [K], or None without such a head."""

    log_probabilities_KV: Tensor
    confidence_K: Tensor | None = field(default=None)


def replay(
    served: Served, weights: Mapping[str, Tensor], embedding_VH: Tensor, head_VH: Tensor, given: Round
) -> Distributions:
    """The distributions that an engine would draw the proposals from. `weights` are the export's, in fp32."""
    features_TC = torch.cat([given.features[layer] for layer in served.feature_layers], -1)
    network = _Network(served, weights)
    if served.method == "eagle3":
        return _chain(network, features_TC, embedding_VH, head_VH, given)
    return _block(network, features_TC, embedding_VH, head_VH, given)


def _block(net: _Network, features_TC: Tensor, embedding_VH: Tensor, head_VH: Tensor, given: Round) -> Distributions:
    served, weights, num_tokens = net.served, net.weights, len(given.prompt_T)
    num_proposed = len(given.proposed_K)
    num_slots = num_proposed if served.anchor_predicts else num_proposed + 1
    assert served.mask_token_id is not None
    context_TH = net.norm(features_TC @ weights["fc.weight"].T, "hidden_norm")
    ids_S = torch.tensor([given.first] + [served.mask_token_id] * (num_slots - 1))
    at_T, at_S = torch.arange(num_tokens), num_tokens + torch.arange(num_slots)
    keys_at = torch.cat([at_T, at_S])
    seen_SX = torch.ones(num_slots, len(keys_at), dtype=torch.bool)
    if served.block_causal:
        seen_SX &= keys_at <= at_S[:, None]
    if served.window is not None:
        seen_SX &= keys_at > at_S[:, None] - served.window
    hidden_SH = embedding_VH[ids_S]
    for index in range(served.num_layers):
        normed_SH = net.norm(hidden_SH, f"layers.{index}.input_layernorm")
        inputs_XH = torch.cat([context_TH, normed_SH])
        hidden_SH = net.finish(index, hidden_SH, net.attend(index, normed_SH, at_S, inputs_XH, keys_at, seen_SX))
    hidden_KH = net.norm(hidden_SH, "norm")[-num_proposed:]
    before_K = torch.cat([torch.tensor([given.first]), given.proposed_K[:-1]])
    logits_KV = hidden_KH @ head_VH.T
    embedded_Kr = None
    if served.markov_rank:
        embedded_Kr = weights["markov_head.markov_w1.weight"][before_K]
        correction_Kr = _correction(served, weights, hidden_KH, embedded_Kr)
        logits_KV = logits_KV + correction_Kr @ weights["markov_head.markov_w2.weight"].T
    confidence_K = None
    if served.confidence:
        seen = [hidden_KH, embedded_Kr] if served.confidence_with_markov and embedded_Kr is not None else [hidden_KH]
        confidence_K = (torch.cat(seen, -1) @ weights["confidence_head.proj.weight"].T)[:, 0]
        confidence_K = confidence_K + weights["confidence_head.proj.bias"]
    return Distributions(log_probabilities_KV=logits_KV.log_softmax(-1), confidence_K=confidence_K)


def _correction(served: Served, weights: Mapping[str, Tensor], hidden_KH: Tensor, embedded_Kr: Tensor) -> Tensor:
    if served.markov_head == "vanilla":
        return embedded_Kr
    if served.markov_head == "gated":
        gate_Kr = torch.cat([hidden_KH, embedded_Kr], -1) @ weights["markov_head.gate_proj.weight"].T
        return torch.sigmoid(gate_Kr + weights["markov_head.gate_proj.bias"]) * embedded_Kr
    state_r, corrections = torch.zeros(served.markov_rank), []
    for hidden_H, embedded_r in zip(hidden_KH, embedded_Kr, strict=True):
        joint = weights["markov_head.joint_proj.weight"] @ torch.cat([state_r, embedded_r, hidden_H])
        gate_r, candidate_r, out_r = (joint + weights["markov_head.joint_proj.bias"]).chunk(3)
        keep_r = torch.sigmoid(gate_r)
        state_r = keep_r * state_r + (1 - keep_r) * torch.tanh(candidate_r)
        corrections.append(torch.tanh(out_r))
    return torch.stack(corrections)


def _chain(net: _Network, features_TC: Tensor, embedding_VH: Tensor, head_VH: Tensor, given: Round) -> Distributions:
    """All positions at once: causal attention gives each what feeding them one by one would, but for the hidden state
    that a proposal is fed with, which is the output at the position before it."""
    served, num_tokens = net.served, len(given.prompt_T)
    ids = torch.cat([given.prompt_T[1:], torch.tensor([given.first]), given.proposed_K[:-1]])
    hidden_TH = features_TC @ net.weights["fc.weight"].T
    if served.norm_before_fc or served.norm_output:
        raise NotImplementedError("no draft here has these norms")
    logits = []
    for step in range(len(given.proposed_K)):
        length = num_tokens + step
        at = torch.arange(length)
        seen = at[None, :] <= at[:, None]
        if served.window is not None:
            seen &= at[None, :] > at[:, None] - served.window
        output_H = _eagle3_layers(net, hidden_TH, embedding_VH[ids[:length]], at, seen)[-1]
        logits.append(net.of_all_tokens(net.norm(output_H[None], "norm")[0] @ head_VH.T))
        hidden_TH = torch.cat([hidden_TH, output_H[None]])
    return Distributions(log_probabilities_KV=torch.stack(logits).log_softmax(-1))


def _eagle3_layers(net: _Network, hidden_TH: Tensor, embedded_TH: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    for index in range(net.served.num_layers):
        inputs = net.norm(embedded_TH if index == 0 else hidden_TH, f"layers.{index}.input_layernorm")
        if index == 0:
            normed_TH = net.norm(hidden_TH, "layers.0.hidden_norm")
            inputs = torch.cat([inputs, normed_TH], -1)
            hidden_TH = normed_TH if net.served.norm_before_residual else hidden_TH
        hidden_TH = net.finish(index, hidden_TH, net.attend(index, inputs, at, inputs, at, seen))
    return hidden_TH


class _Network:
    """The parts of a layer, and of what follows the last."""

    def __init__(self, served: Served, weights: Mapping[str, Tensor]) -> None:
        self.served, self.weights = served, weights
        self.inverse_frequencies, self.factor = rotary_frequencies(served)

    def of_all_tokens(self, logits_D: Tensor) -> Tensor:
        """Logits of a reduced vocabulary among those of all tokens, as the export's offsets say."""
        offsets_D = self.weights.get(OFFSETS)
        if offsets_D is None:
            return logits_D
        ids_D = torch.arange(len(offsets_D)) + offsets_D
        return torch.full((self.served.vocab_size,), -torch.inf).index_copy(0, ids_D, logits_D)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMSNorm over the last dimension."""
        scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.served.norm_eps)
        return scaled * self.weights[f"{name}.weight"]

    def attend(
        self, index: int, queries_in: Tensor, queries_at: Tensor, keys_in: Tensor, keys_at: Tensor, seen: Tensor
    ) -> Tensor:
        """Attention of one layer, projected back, [queries, H]. seen [queries, keys] is true for keys in sight."""
        served, name = self.served, f"layers.{index}.self_attn"
        q = (queries_in @ self.weights[f"{name}.q_proj.weight"].T).view(-1, served.num_heads, served.head_dim)
        k = (keys_in @ self.weights[f"{name}.k_proj.weight"].T).view(-1, served.num_kv_heads, served.head_dim)
        v = (keys_in @ self.weights[f"{name}.v_proj.weight"].T).view(-1, served.num_kv_heads, served.head_dim)
        if served.head_norms:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k = self._rotated(q, queries_at), self._rotated(k, keys_at)
        k, v = (part.repeat_interleave(served.num_heads // served.num_kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * served.head_dim**-0.5
        shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", shares, v).flatten(1) @ self.weights[f"{name}.o_proj.weight"].T

    def finish(self, index: int, residual: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after attention and MLP."""
        name = f"layers.{index}"
        hidden = residual + attended
        normed = self.norm(hidden, f"{name}.post_attention_layernorm")
        gate = F.silu(normed @ self.weights[f"{name}.mlp.gate_proj.weight"].T)
        up = normed @ self.weights[f"{name}.mlp.up_proj.weight"].T
        return hidden + (gate * up) @ self.weights[f"{name}.mlp.down_proj.weight"].T

    def _rotated(self, x: Tensor, at: Tensor) -> Tensor:
        angles = at[:, None, None].float() * self.inverse_frequencies
        cos, sin = (torch.cat([part(angles)] * 2, -1) * self.factor for part in (torch.cos, torch.sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def rotary_frequencies(served: Served) -> tuple[Tensor, float]:
    """Inverse frequencies [D / 2] and the factor of cosines and sines, of the rotary embedding that an export says."""
    rope = served.rope
    if rope.get("rope_type", "default") == "default":
        exponents = torch.arange(0, served.head_dim, 2).float() / served.head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    config = AutoConfig.for_model(
        "qwen3",
        rope_parameters=dict(rope),
        head_dim=served.head_dim,
        hidden_size=served.hidden_size,
        num_attention_heads=served.num_heads,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)
