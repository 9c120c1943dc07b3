"""Attention of a target on the CPU: query heads that share keys read them without copies.

transformers copies keys and values once for every query head where there is a mask, because that suits some
accelerators. On the CPU the kernel reads shared keys itself: with 14 query heads on 2 of keys, 32 sequences and 150
keys a pass of attention was 2 to 8 times as fast, and equal to the last bit. Knows transformers' attention functions;
no family, no cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "sdpa_shared_keys"
# What the kernel below does not know; transformers' own function does, or refuses it.
_OTHERS = ("softcap", "position_bias", "cache", "output_attentions")


def read_shared_keys(model: Any) -> None:
    """Have a model on the CPU attend this way, if it would with "sdpa" otherwise."""
    on_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    if on_cpu and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attend)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Queries [B, h, T, D], keys and values [B, G, L, D]; [B, T, h, D] comes back."""
    # Several tokens without a mask are plain causal. One token sees all keys. transformers' function finds that out in
    # every layer anew, which takes as long as attending.
    causal = attention_mask is None and query.shape[2] > 1
    if causal or key.device.type != "cpu" or any(more.get(name) for name in _OTHERS):
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return found
    attended_BhTD = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended_BhTD.transpose(1, 2).contiguous(), None
