"""What train_step.py measures: drafts of the asked sizes, random batches, the step of this project, the products alone.

The useful operations of a step are listed product by product (`Product`): their sum is the figure behind FLOP/s, and
multiplying them, each forward and backward once and nothing else, is the floor that times are compared with.

Legend: T tokens, A anchors, K slots of a block, S = A * K slots, R counted rows, P distinct target positions, H hidden
size, I width of the MLP, V vocabulary, r rank of the correction, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor
from train_step_baseline import GAMMA, MIX, BlockDraft, MasterAdamW, StepDraft
from transformers import Qwen3Config

from deepspec_core.checkpoints.published import published_weights
from deepspec_core.config.loss_options import LossOptions, WeightingOptions
from deepspec_core.contracts.draft import DraftBatch, DraftModel, Preparation, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.training.reduction import StepSums, normalise
from deepspec_core.training.step import TrainingStep
from deepspec_targets.qwen3 import Qwen3Adapter

LR, CLIP = 6e-4, 1.0


@frozen(kw_only=True)
class Case:
    """One set of sizes. `algorithm`: dflash, dspark or eagle3; `layers` is ignored by Eagle3, which has one."""

    algorithm: str
    tokens: int
    anchors: int
    device: str = "cpu"
    dtype: str = "bfloat16"
    hidden: int = 896
    intermediate: int = 4864
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 151_936
    layers: int = 5
    taps: int = 5
    block: int = 7
    rank: int = 256

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def config(self) -> Qwen3Config:
        return Qwen3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            num_hidden_layers=24,
            tie_word_embeddings=False,
            max_position_embeddings=32_768,
            initializer_range=0.02,
        )


def new_draft(case: Case, registry: Registry) -> DraftModel:
    """The draft with new weights, fp32 where trained; the target's embedding and head are random, in the dtype."""
    torch.manual_seed(0)
    options = registry.get("draft", case.algorithm).options(num_anchors=case.anchors)
    if case.algorithm == "eagle3":
        options = evolve(options, ttt_length=case.block)
    else:
        options = evolve(options, num_layers=case.layers, block_size=case.block, mask_token_id=case.vocab - 1)
    if case.algorithm == "dspark":
        options = evolve(options, markov=evolve(options.markov, rank=case.rank))
    draft: DraftModel = registry.load("draft", case.algorithm)(
        options, Qwen3Adapter(case.config), tuple(range(case.taps))
    )
    head = torch.randn(case.vocab, case.hidden) * (2.0 / case.hidden**0.5)
    draft.adopt(torch.randn(case.vocab, case.hidden), head)
    for frozen_part in (draft.embed_tokens, draft.lm_head):
        frozen_part.to(case.torch_dtype)
    return draft.to(case.device)


def new_batch(case: Case, preparation: Preparation, seed: int) -> DraftBatch:
    """One sequence of random tokens and features, all but the first token supervised."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.tokens, case.taps * case.hidden, generator=generator).to(case.torch_dtype)
    last = torch.randn(case.tokens, case.hidden, generator=generator).to(case.torch_dtype)
    sample = Sample(
        id="0",
        input_ids=torch.randint(0, case.vocab - 1, (case.tokens,), generator=generator),
        loss_mask=torch.arange(case.tokens) > 0,
        original_length=case.tokens,
    )
    batch = DraftBatch(
        input_ids=sample.input_ids[None],
        loss_mask=sample.loss_mask[None],
        attention_mask=torch.ones(1, case.tokens, dtype=torch.bool),
        features=TargetFeatures(hidden=hidden[None], last_hidden=last[None]),
        prepared=preparation.collate([preparation.prepare(sample, np.random.default_rng(seed))]),
    )
    return batch.to(case.device)


def plain_batch(batch: DraftBatch) -> dict[str, Tensor]:
    """The same batch as the baseline reads it."""
    prepared = {name: batch.prepared[name] for name in ("anchors", "index", "step", "weight") if name in batch.prepared}
    features = {"hidden": batch.features.hidden, "last_hidden": batch.features.last_hidden}
    return {"input_ids": batch.input_ids, **features, **prepared}


def terms(case: Case) -> LossOptions:
    """The published loss of the algorithm."""
    if case.algorithm == "eagle3":
        return LossOptions(terms={"soft_ce": 1.0})
    weighting = WeightingOptions(type="decay", options=DecayOptions(gamma=GAMMA))
    return LossOptions(terms=MIX if case.algorithm == "dspark" else {"ce": 1.0}, weighting=weighting)


class OwnStep:
    """The step as training/trainer.py does it: forward, loss, backward, division, clipping, AdamW."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.draft = new_draft(case, registry).train()
        self.preparation = self.draft.preparation
        engine = build_engine(terms(case), registry)
        self.step = TrainingStep(self.draft, engine, compute_dtype=case.torch_dtype, alone=True)
        self.weights = [weight for weight in self.draft.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, weight_decay=0.0, fused=True)
        self.step.weights.follow(self.optimizer)

    def gradient(self, batches: list[DraftBatch]) -> Tensor:
        """Forward, loss and backward of every micro-batch, and the division and clipping; the mean loss."""
        sums = StepSums(batches[0].input_ids.device)
        for batch in batches:
            result = self.step(batch)
            result.total.backward()
            sums.add(result.denominator, result.metrics)
        vector = sums.reduce(["loss"], flag=False)
        normalise(self.weights, vector[0], world_size=1, clip_norm=CLIP)
        return vector[2] / vector[3]

    def update(self) -> None:
        """The optimizer."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """Bytes of the gradients, which exist for a part of the step only."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)


class Baseline:
    """The same with train_step_baseline.py."""

    def __init__(self, case: Case, registry: Registry) -> None:
        draft = new_draft(case, registry)
        self.preparation = draft.preparation
        made: BlockDraft | StepDraft
        if case.algorithm == "eagle3":
            made = StepDraft(case.config, taps=case.taps, steps=case.block)
        else:
            made = BlockDraft(
                case.config,
                layers=case.layers,
                taps=case.taps,
                block=case.block,
                mask_id=case.vocab - 1,
                rank=case.rank if case.algorithm == "dspark" else 0,
            )
        weights = {name: value.float() for name, value in published_weights(draft).items()}
        made.adopt(weights, case.torch_dtype)
        self.draft = made.to(case.device).train()
        self.optimizer = MasterAdamW(self.draft, lr=LR, clip_norm=CLIP)

    def gradient(self, batches: list[DraftBatch]) -> Tensor:
        """Forward, loss and backward of every micro-batch; the mean loss."""
        losses = []
        for batch in batches:
            loss = self.draft.loss(plain_batch(batch)) / len(batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def update(self) -> None:
        """Clipping and the optimizer."""
        self.optimizer.step()

    def kept_bytes(self) -> int:
        """Bytes of the gradients in the weights' dtype."""
        return sum(weight.numel() * weight.element_size() for weight in self.optimizer.weights)


@frozen
class Product:
    """[M, K] @ [K, N], `count` of them. Backward: the gradients of the left factor and of the right, where wanted."""

    m: int
    k: int
    n: int
    count: int = 1
    left: bool = True
    right: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.count * (1 + self.left + self.right)


def useful(case: Case, batch: DraftBatch) -> dict[str, Product]:
    """The products that the loss and its gradient need, by name. Heads of the target are frozen.

    Of attention: pairs of a query and a key that it sees, averaged over queries.
    """
    prepared = batch.prepared
    hidden, inner, kv = case.hidden, case.heads * case.head_dim, case.kv_heads * case.head_dim
    rows = len(prepared["target_index"]) if case.algorithm == "eagle3" else len(prepared["block"])
    found = {"fc": Product(case.tokens, case.taps * hidden, hidden, left=False)}
    if case.algorithm == "eagle3":
        # Keys and values of step 0 are of all tokens; all else is of places that something is predicted from.
        first, later = case.tokens, len(prepared["later_index"]) * (case.block - 1)
        first_queries = len(torch.unique(prepared["index"]))
        queries, width, layers = first_queries + later, 2 * hidden, 1
        found["context keys, values"] = Product(first, width, 2 * kv)
        own = later
        pairs = int((prepared["index"] + 1).sum() + prepared["step"].sum())
    else:
        queries, width, layers = len(prepared["anchors"]) * case.block, hidden, case.layers
        found["context keys, values"] = Product(case.tokens, hidden, 2 * kv, layers)
        own = queries
        pairs = case.block * int((prepared["anchors"] + case.block).sum())
    found |= {
        "queries": Product(queries, width, inner, layers),
        "keys, values": Product(own, width, 2 * kv, layers),
        "attention out": Product(queries, inner, hidden, layers),
        "gate, up": Product(queries, hidden, 2 * case.intermediate, layers),
        "down": Product(queries, case.intermediate, hidden, layers),
        "scores": Product(queries, case.head_dim, pairs // queries, layers * case.heads),
        "attended values": Product(queries, pairs // queries, case.head_dim, layers * case.heads),
        "draft head": Product(rows, hidden, case.vocab, right=False),
    }
    if case.algorithm != "dflash":
        positions = len(prepared["target_position"])
        found["target head"] = Product(positions, hidden, case.vocab, left=False, right=False)
    if case.algorithm == "dspark":
        found["correction"] = Product(rows, case.rank, case.vocab)
    return found


class Products:
    """Every useful product forward and backward once, in the dtype, each into memory of its own shape."""

    def __init__(self, case: Case, registry: Registry) -> None:
        self.case = case
        with torch.device("meta"):
            self.preparation = new_draft(evolve(case, device="meta"), registry).preparation
        self._factors: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def gradient(self, batches: list[DraftBatch]) -> Tensor:
        """All products of every batch."""
        with torch.no_grad():
            for batch in batches:
                for name, product in useful(self.case, batch).items():
                    left_MK, right_NK, out_MN = self._of(name, product)
                    for _ in range(product.count):
                        torch.mm(left_MK, right_NK.T, out=out_MN)
                        if product.left:
                            out_MN @ right_NK
                        if product.right:
                            out_MN.T @ left_MK
        return torch.zeros(())

    def prepare(self, batch: DraftBatch) -> None:
        """Make the factors, outside of what is timed."""
        for name, product in useful(self.case, batch).items():
            self._of(name, product)

    def _of(self, name: str, product: Product) -> tuple[Tensor, Tensor, Tensor]:
        m, k, n = product.m, product.k, product.n
        kept = self._factors.get(name)
        if kept is None or kept[0].shape != (m, k) or kept[1].shape != (n, k):
            with torch.device(self.case.device):
                made = torch.randn(m, k), torch.randn(n, k) * k**-0.5, torch.empty(m, n)
            self._factors[name] = kept = tuple(part.to(self.case.torch_dtype) for part in made)  # type: ignore[assignment]
        return kept

    def update(self) -> None:
        """Nothing."""

    def kept_bytes(self) -> int:
        """Nothing."""
        return 0


ARMS: dict[str, Any] = {"baseline": Baseline, "step": OwnStep, "products": Products}


def new_arm(way: str, case: Case) -> Any:
    """One of ARMS."""
    return ARMS[way](case, load_plugins().registry)
