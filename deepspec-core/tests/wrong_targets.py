"""A target family that may be wrong: what it changes in a right one, by what is wrong. Knows one family.

`CAUGHT` says which test of the suite has to fail, and a word of what it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from attrs import evolve
from torch import Tensor, nn

from deepspec_core.contracts.target import AttentionProjections, ConversationFormat, TargetFeatures, TargetStep
from deepspec_core.errors import TargetError
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_targets.qwen3 import Qwen3Adapter

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class WrongTarget(TransformersTarget):
    what: str
    opened = False

    def open_slots(self, num_slots: int, max_length: int) -> None:
        if self.what == "keeps its slots when they are opened again" and self.opened:
            return
        self.opened = True
        if self.what == "opens four slots at most":
            num_slots = min(num_slots, 4)
        super().open_slots(num_slots, 40 if self.what == "opens slots of 40 tokens" else max_length)

    def embedding_weight(self) -> Tensor:
        found = super().embedding_weight()
        return found.clone().requires_grad_() if self.what == "gives an embedding with a gradient" else found

    def features(self, ids: Tensor, mask: Tensor, positions: Any, documents: Any, taps: Any) -> TargetFeatures:
        if self.what == "draws random numbers":
            torch.rand(1, device="cpu")
        if self.what == "taps off by one":
            taps = [tap + 1 for tap in taps]
        if self.what == "attends to other documents":
            documents = None
        found = super().features(ids, mask, positions, documents, taps)
        if self.what == "padding leaks":
            return evolve(found, hidden=found.hidden + found.hidden.mean(1, keepdim=True))
        if self.what == "last layer before its norm":
            return evolve(found, last_hidden=2 * found.last_hidden)
        if self.what == "taps in falling order" and len(taps) > 1:
            return evolve(found, hidden=torch.cat(found.hidden.chunk(len(taps), -1)[::-1], -1))
        return found

    def decode(self, slots: Tensor, ids: Tensor, positions: Tensor, taps: Any, **options: Any) -> TargetStep:
        if self.what == "forms all logits" and options.get("last_only"):
            options["last_only"] = False
        if self.what == "rows for slots":
            slots = torch.arange(len(slots))
        if self.what == "a tree as a chain" and options.get("sees") is not None:
            options["sees"] = torch.ones_like(options["sees"]).tril()
            positions = positions[:, :1] + torch.arange(positions.shape[1])
        found = super().decode(slots, ids, positions, taps, **options)
        if self.what == "writes into positions":
            positions.clamp_(min=0)
        return found

    def commit(self, slots: Tensor, lengths: Tensor, kept: Tensor | None = None) -> None:
        if self.what == "the key-value cache is not cropped":
            lengths = torch.maximum(lengths, self.committed_S[slots])
        super().commit(slots, lengths, None if self.what == "commits the first columns of a tree" else kept)


class _Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class WrongAdapter(Qwen3Adapter):
    what: ClassVar[str] = ""
    kept: Sequence[nn.Module] = ()

    def load(self, where: Any, **given: Any) -> Any:
        if self.what == "loads in float32 whatever is asked":
            given["dtype"] = torch.float32
        try:
            found = super().load(where, **given)
        except TargetError:
            if self.what != "loads without some weights":
                raise
            return None
        found.__class__ = WrongTarget
        found.what = self.what  # type: ignore[attr-defined]
        if self.what == "says another dtype than it has":
            found.dtype = torch.bfloat16  # type: ignore[attr-defined]
        if self.what == "loads weights with gradients":
            found.model.requires_grad_(True)  # type: ignore[attr-defined]
        if self.what == "stays in training mode":
            found.model.train()  # type: ignore[attr-defined]
        return found

    def embedding(self) -> nn.Module:
        if self.what == "scales the embedding":
            return _Scaled(self.text.vocab_size, self.text.hidden_size)
        return super().embedding()

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        return super().norm(size, scale=scale or self.what == "norms with a scale alone")

    def mlp(self) -> nn.Module:
        if self.what == "one MLP for all layers":
            if not self.kept:
                self.kept = [super().mlp()]
            return self.kept[0]
        return super().mlp()

    def attention_projections(self, in_features: int) -> AttentionProjections:
        found = super().attention_projections(in_features)
        if self.what == "another scale of attention":
            return evolve(found, scale=1.0)
        return evolve(found, names={**found.names, "query": "wq"}) if self.what == "other names of weights" else found

    def conversation_format(self) -> ConversationFormat:
        found = super().conversation_format()
        if self.what == "another family's answers":
            return evolve(found, assistant_start="<|assistant|>\n")
        return evolve(found, assistant_ends=()) if self.what == "answers without an end" else found


CAUGHT = {
    "taps off by one": ("features_are_the_models_hidden_states", "tap -1"),
    "taps in falling order": ("features_are_the_models_hidden_states", "tap -1"),
    "last layer before its norm": ("features_are_the_models_hidden_states", "last_hidden"),
    "padding leaks": ("padding_does_not_leak", "padded"),
    "attends to other documents": ("documents_are_apart", "document"),
    "rows for slots": ("decoding_is_the_forward_pass", ""),
    "the key-value cache is not cropped": ("tokens_are_taken_back", ""),
    "commits the first columns of a tree": ("trees_are_their_paths", "committed"),
    "a tree as a chain": ("trees_are_their_paths", ""),
    "forms all logits": ("prefill", "logits"),
    "scales the embedding": ("the_embedding_is_the_targets", "tap -1"),
    "another scale of attention": ("blocks_are_the_targets", "layer 2"),
    "other names of weights": ("blocks_are_the_targets", "wq"),
    "norms with a scale alone": ("norms_without_a_scale", "weight"),
    "one MLP for all layers": ("modules_are_new", "mlp"),
    "another family's answers": ("the_template_has_such_answers", "disagree"),
    "loads without some weights": ("missing_weights_are_refused", "all the same"),
    "keeps its slots when they are opened again": ("slots_are_opened_as_asked", ""),
    "opens four slots at most": ("slots_are_opened_as_asked", "index"),
    "opens slots of 40 tokens": ("slots_are_opened_as_asked", "max_length"),
    "loads in float32 whatever is asked": ("it_is_loaded_in_the_dtype_that_is_asked", "torch.float32"),
    "says another dtype than it has": ("it_is_loaded_in_the_dtype_that_is_asked", "`dtype`"),
    "gives an embedding with a gradient": ("it_is_frozen", "embedding_weight()"),
    "loads weights with gradients": ("it_is_frozen", "trained"),
    "stays in training mode": ("it_is_frozen", "training mode"),
    "draws random numbers": ("what_it_is_given_stays", "random numbers"),
    "writes into positions": ("what_it_is_given_stays", "positions"),
    "answers without an end": ("answers_can_be_found", "assistant_ends"),
}
