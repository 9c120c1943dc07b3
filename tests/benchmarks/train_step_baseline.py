"""The baseline of train_step.py: a training step as one writes it down, with plain modules, masks and losses.

Weights are bf16 with fp32 masters in the optimizer. Blocks attend to the context and to each other through one dense
boolean mask (SDPA). The logits of draft and target are formed for every row, and the losses are computed on them in
fp32, an operation at a time. Nothing is compiled. Eagle3's later steps score their own keys by elementwise products, as
its published training does; its network runs over whole sequences at every step, its logits over the counted rows.

Knows published weight names, so that it starts from the same weights as a draft. Does not know the project's training.

Legend: T tokens, C = taps * H, H hidden size, A blocks, K slots of a block, Q = A * K, R rows, V vocabulary, h heads,
G kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

GAMMA = 4.0
MIX = {"ce": 0.1, "tv": 0.9, "confidence": 1.0}


class Attention(nn.Module):
    """Projections under their published names."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.groups * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.groups * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)
        self.q_norm = Qwen3RMSNorm(self.size, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.size, eps=config.rms_norm_eps)

    def queries(self, x: Tensor) -> Tensor:
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.size))).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return self.k_norm(self.k_proj(x).unflatten(-1, (self.groups, self.size))).transpose(1, 2)

    def values(self, x: Tensor) -> Tensor:
        return self.v_proj(x).unflatten(-1, (self.groups, self.size)).transpose(1, 2)

    def out(self, attended_1hQD: Tensor) -> Tensor:
        return self.o_proj(attended_1hQD.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A decoder layer; `hidden_norm` for Eagle3's first, whose attention reads tokens and hidden states."""

    def __init__(self, config: Any, *, reads_tokens: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.hidden_size * (2 if reads_tokens else 1))
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if reads_tokens:
            self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Draft(nn.Module):
    def __init__(self, config: Any, *, layers: int, taps: int, reads_tokens: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(Layer(config, reads_tokens=reads_tokens) for _ in range(layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)

    def adopt(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take the weights of a draft, by their published names, in `dtype`; embedding and head are frozen."""
        self.load_state_dict(dict(weights), strict=True, assign=False)
        self.to(dtype)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def target_logits(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.lm_head(hidden).float()


class BlockDraft(_Draft):
    """DFlash; with a rank, DSpark. One sequence with all of its blocks."""

    def __init__(self, config: Any, *, layers: int, taps: int, block: int, mask_id: int, rank: int) -> None:
        super().__init__(config, layers=layers, taps=taps, reads_tokens=False)
        self.block, self.mask_id = block, mask_id
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if rank:
            self.markov_head = nn.Module()
            self.markov_head.markov_w1 = nn.Embedding(config.vocab_size, rank)
            self.markov_head.markov_w2 = nn.Linear(rank, config.vocab_size, bias=False)
            self.confidence_head = nn.Module()
            self.confidence_head.proj = nn.Linear(config.hidden_size + rank, 1)
        self.rank = rank

    def loss(self, data: Mapping[str, Tensor]) -> Tensor:
        """sum over the loss's terms of sum(w * term) / sum(w)."""
        ids_T, anchors_A, length = data["input_ids"][0], data["anchors"], data["input_ids"].shape[1]
        position_AK = anchors_A[:, None] + torch.arange(self.block, device=anchors_A.device)
        hidden_1QH = self.run(data, ids_T, anchors_A, position_AK)
        label_Q = ids_T[(position_AK + 1).clamp(max=length - 1)].flatten()
        decay_K = torch.exp(-torch.arange(self.block, device=ids_T.device) / GAMMA)
        weight_Q = ((position_AK + 1 < length) * decay_K).flatten()
        logits_QV = self.lm_head(hidden_1QH[0])
        if not self.rank:
            ce_Q = F.cross_entropy(logits_QV.float(), label_Q, reduction="none")
            return (weight_Q * ce_Q).sum() / (weight_Q.sum() + 1e-6)
        before_Qr = self.markov_head.markov_w1(ids_T[position_AK.clamp(max=length - 1)].flatten())
        logits_QV = (logits_QV + self.markov_head.markov_w2(before_Qr)).float()
        confidence_Q = self.confidence_head.proj(torch.cat([hidden_1QH[0], before_Qr], -1)).squeeze(-1).float()
        target_QV = self.target_logits(data["last_hidden"][0, position_AK.clamp(max=length - 1).flatten()])
        ce_Q = F.cross_entropy(logits_QV, label_Q, reduction="none")
        tv_Q = (logits_QV.softmax(-1) - target_QV.softmax(-1)).abs().sum(-1)
        accepted_Q = (1 - tv_Q.detach() / 2).clamp(0, 1)
        judged_Q = F.binary_cross_entropy_with_logits(confidence_Q, accepted_Q, reduction="none")
        mixed_Q = MIX["ce"] * ce_Q + MIX["tv"] * tv_Q + MIX["confidence"] * judged_Q
        return (weight_Q * mixed_Q).sum() / (weight_Q.sum() + 1e-6)

    def run(self, data: Mapping[str, Tensor], ids_T: Tensor, anchors_A: Tensor, position_AK: Tensor) -> Tensor:
        length, block = len(ids_T), self.block
        context_1TH = self.hidden_norm(self.fc(data["hidden"]))
        block_AK = torch.full_like(position_AK, self.mask_id)
        block_AK[:, 0] = ids_T[anchors_A]
        hidden_1QH = self.embed_tokens(block_AK.flatten())[None]
        index_T, owner_Q = torch.arange(length, device=ids_T.device), torch.arange(block_AK.numel()) // block
        seen_QT = index_T < anchors_A.repeat_interleave(block)[:, None]
        owner_Q = owner_Q.to(ids_T.device)
        mask_11QX = torch.cat([seen_QT, owner_Q[:, None] == owner_Q], dim=1)[None, None]
        position_1X = torch.cat([index_T, position_AK.flatten()])[None]
        cos, sin = self.rotary(hidden_1QH, position_1X)
        for layer in self.layers:
            attention, normed = layer.self_attn, layer.input_layernorm(hidden_1QH)
            keys = torch.cat([attention.keys(context_1TH), attention.keys(normed)], dim=2)
            values = torch.cat([attention.values(context_1TH), attention.values(normed)], dim=2)
            queries = attention.queries(normed)
            queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, length:], sin[:, length:])
            keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask_11QX, enable_gqa=True)
            hidden_1QH = layer.finish(hidden_1QH, attention.out(attended))
        return self.norm(hidden_1QH)


class StepDraft(_Draft):
    """Eagle3 with one layer: test-time training over one sequence."""

    def __init__(self, config: Any, *, taps: int, steps: int) -> None:
        super().__init__(config, layers=1, taps=taps, reads_tokens=True)
        self.steps = steps

    def loss(self, data: Mapping[str, Tensor]) -> Tensor:
        """The sum over steps and counted rows of weight * soft cross-entropy, with the batch's weights (0.8^s / T)."""
        ids_1T, hidden_1TH = data["input_ids"], self.fc(data["hidden"])
        length = ids_1T.shape[1]
        layer, index_T = self.layers[0], torch.arange(length, device=ids_1T.device)
        causal_TT = (index_T[:, None] >= index_T)[None, None]
        kept: list[tuple[Tensor, Tensor]] = []
        total = hidden_1TH.new_zeros((), dtype=torch.float32)
        for step in range(self.steps):
            embedded = self.embed_tokens(F.pad(ids_1T[:, step + 1 :], (0, step + 1)))
            inputs = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden_1TH)], dim=-1)
            cos, sin = self.rotary(hidden_1TH, index_T[None] + step)
            queries, keys = apply_rotary_pos_emb(
                layer.self_attn.queries(inputs), layer.self_attn.keys(inputs), cos, sin
            )
            kept.append((keys, layer.self_attn.values(inputs)))
            hidden_1TH = layer.finish(hidden_1TH, layer.self_attn.out(attend_steps(queries, kept, causal_TT)))
            of_step = data["step"] == step
            at_R = data["index"][of_step]
            logits_RV = self.lm_head(self.norm(hidden_1TH[0, at_R])).float()
            target_RV = self.target_logits(data["last_hidden"][0, at_R + step + 1])
            ce_R = -(target_RV.softmax(-1) * logits_RV.log_softmax(-1)).sum(-1)
            total = total + (data["weight"][of_step] * ce_R).sum()
        return total


def attend_steps(queries_1hTD: Tensor, kept: list[tuple[Tensor, Tensor]], causal_TT: Tensor) -> Tensor:
    """Softmax over the first step's keys up to the query, and the later steps' keys at its own index."""
    heads, groups = queries_1hTD.shape[1], kept[0][0].shape[1]
    (first_keys, first_values), *later = [
        tuple(part.repeat_interleave(heads // groups, dim=1) for part in pair) for pair in kept
    ]
    scale = queries_1hTD.shape[-1] ** -0.5
    if not later:
        return F.scaled_dot_product_attention(queries_1hTD, first_keys, first_values, attn_mask=causal_TT)
    scores = (queries_1hTD @ first_keys.mT * scale).masked_fill(~causal_TT, -torch.inf)
    own = [(queries_1hTD * keys).sum(-1, keepdim=True) * scale for keys, _ in later]
    shares = torch.cat([scores, *own], dim=-1).float().softmax(-1).to(queries_1hTD.dtype)
    length = first_keys.shape[2]
    attended = shares[..., :length] @ first_values
    for number, (_, values) in enumerate(later):
        attended = attended + shares[..., length + number, None] * values
    return attended


class MasterAdamW:
    """AdamW over fp32 copies of bf16 weights; the weights are copied back after every step."""

    def __init__(self, module: nn.Module, *, lr: float, clip_norm: float) -> None:
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        self.inner = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=True)
        self.clip_norm = clip_norm

    def step(self) -> None:
        """Clip, update, copy back, drop gradients."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
