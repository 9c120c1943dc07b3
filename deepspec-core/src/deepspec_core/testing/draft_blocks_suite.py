"""Clauses of the modules that a family makes for drafts: norms, layers, and the config of a draft.

A tiny model with random weights is compared with transformers' own forward pass. This file knows the contract of
adapters and transformers' conventions. It does not know how a target runs.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from attrs import fields
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deepspec_core.checkpoints.published import layer_names, published_name
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.layers.options import LayerOptions
from deepspec_core.testing.conformance import Suite, clause, require

_ADAPTER = "deepspec_core/contracts/target.py: TargetAdapter"
_SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip


class DraftBlocksSuite(Suite):
    """Clauses about the modules that `contracts.target.TargetAdapter` makes for drafts.

    model_type: The config's model_type, if the family has several config classes; None: the spec's first.
    sizes: Additional keys of the config. The usual ones give six layers, H 32 and V 61.
    layer: The draft's own shape, for families whose targets have layers that no draft has.
    full_layer: A layer of the target that is built of the same blocks as a draft's layer; None if there is none.
    """

    kind = "target"
    model_type: ClassVar[str | None] = None
    sizes: ClassVar[Mapping[str, Any]] = {}
    layer: ClassVar[LayerOptions | None] = None
    full_layer: ClassVar[int | None] = 2
    tolerance: ClassVar[float] = 1e-4

    def config(self) -> Any:
        """The transformers config of a tiny target."""
        from transformers import AutoConfig

        spec = self.registry().get("target", self.component)
        return AutoConfig.for_model(self.model_type or spec.model_types[0], **{**_SIZES, **self.sizes})

    def adapter(self) -> TargetAdapter:
        """The adapter of that config."""
        made: TargetAdapter = self.registry().load("target", self.component)(self.config(), self.layer)
        return made

    def model(self) -> Any:
        """transformers' model of that config. All weights are random, also those that begin as 0 or 1."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config(), attn_implementation="sdpa").float().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    @clause(
        "`norm` is of the size that is asked; with scale=False it has no weight, and is a new one's", written=_ADAPTER
    )
    def test_norms_without_a_scale(self) -> None:
        adapter = self.adapter()
        for size in (None, 12):
            scaled, bare = adapter.norm(size), adapter.norm(size, scale=False)
            kept = sorted(bare.state_dict())
            require(not kept, f"norm({size}, scale=False) has {kept}")
            x_TH = torch.randn(3, size or adapter.architecture.hidden_size, generator=torch.Generator().manual_seed(4))
            with torch.no_grad():
                self.near(bare(x_TH), scaled(x_TH), f"norm({size}, scale=False), beside a new norm({size})")

    @clause("each call that makes a module gives a new one, with weights of its own", written=_ADAPTER)
    def test_modules_are_new(self) -> None:
        adapter = self.adapter()
        for name in ("mlp", "norm", "embedding", "layer_norms"):
            first, again = (getattr(adapter, name)() for _ in range(2))
            shared = {id(part) for part in _parameters(first)} & {id(part) for part in _parameters(again)}
            require(not shared, f"two calls of {name}() share weights")

    @clause(
        "a layer of the family's blocks, with the weights of a target's layer, computes that layer", written=_ADAPTER
    )
    def test_blocks_are_the_targets(self) -> None:
        adapter = self.adapter()
        layer = DraftLayer(adapter)
        holder, names = nn.ModuleDict({"layers": nn.ModuleList([layer])}), layer_names([layer])
        own = {
            published_name(name, names).removeprefix("layers.0."): part for name, part in holder.state_dict().items()
        }
        heads = adapter.attention_projections(adapter.architecture.hidden_size)
        cos, _ = adapter.rotary()(torch.zeros(1, 1, 1), torch.arange(5)[None])
        require(
            cos.shape == (1, 5, heads.head_dim), f"angles {list(cos.shape)}, and heads have {heads.head_dim} channels"
        )
        if self.full_layer is None:
            return
        model = self.model()
        theirs = model.model.layers[self.full_layer].state_dict()
        require(own.keys() == theirs.keys(), f"weights by published name differ: {sorted(own.keys() ^ theirs.keys())}")
        for name, tensor in own.items():
            require(
                tensor.shape == theirs[name].shape, f"{name} is {list(tensor.shape)}, not {list(theirs[name].shape)}"
            )
            tensor.copy_(theirs[name])
        with torch.no_grad():
            ids_BT = tokens(11, seed=9)[None]
            states = model(ids_BT, output_hidden_states=True).hidden_states
            found = layer(states[self.full_layer], _causal(layer, adapter.rotary()))
        self.near(found, states[self.full_layer + 1], f"the output of layer {self.full_layer}")

    @clause(
        "`draft_config` is a config.json that its family reads back, and the target's config stays", written=_ADAPTER
    )
    def test_the_drafts_config(self) -> None:
        from transformers import AutoConfig

        config = self.config()
        before = config.to_dict()
        adapter: TargetAdapter = self.registry().load("target", self.component)(config, self.layer)
        with TemporaryDirectory() as folder:
            adapter.draft_config(2, {"block_size": 7, "architectures": ["SomeDraft"]}).save_pretrained(folder)
            read = AutoConfig.from_pretrained(folder)
            json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        require(read.num_hidden_layers == 2, f"num_hidden_layers = {read.num_hidden_layers}, not 2")
        require(read.block_size == 7, "keys of `extra` are not at the top level")
        require(config.to_dict() == before, "the target's own config has changed")
        # A draft may be of another family than its target, such as a dense one.
        family = self.registry().adapter_for(read.model_type).name
        again = self.registry().load("target", family)(read)
        require(again.unsupported() is None, f"the family {family!r} cannot read it back: {again.unsupported()}")

    def near(self, found: Tensor, expected: Tensor, words: str) -> None:
        require(found.shape == expected.shape, f"{words}: {list(found.shape)}, not {list(expected.shape)}")
        gap = float((found - expected).abs().max())
        limit = self.tolerance * max(1.0, float(expected.abs().max()))
        require(gap <= limit, f"{words}: other numbers, by up to {gap:.3g}")


def tokens(length: int, seed: int) -> Tensor:
    """Random ids of the tiny target's tokens."""
    return torch.randint(2, 61, (length,), generator=torch.Generator().manual_seed(seed))


def _parameters(made: Any) -> Iterator[nn.Parameter]:
    """The parameters of a module, or of the modules that an attrs object holds."""
    modules = [made] if isinstance(made, nn.Module) else [getattr(made, one.name) for one in fields(type(made))]
    for module in modules:
        if isinstance(module, nn.Module):
            yield from module.parameters()


def _causal(layer: DraftLayer, rotary: nn.Module) -> Any:
    """A causal mask: every position attends to itself and to earlier positions."""
    attention = layer.attention

    def attend(normed_BTH: Tensor) -> Tensor:
        at = rotary(normed_BTH, torch.arange(normed_BTH.shape[1])[None])
        keys, values = attention.keys_values(normed_BTH, at)
        queries = attention.queries(normed_BTH, at)
        return attention.combine(
            scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=attention.scale, enable_gqa=True)
        )

    return attend
