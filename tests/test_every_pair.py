"""Every installed algorithm on every installed family: it learns, keeps the target's weights, saves, loads, and decodes
without changing a single greedy output. Both are asked of the registry, so a new plugin is tested the day it is there.
"""

import ast
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import save_draft
from deepspec_core.config.schema import LossOptions
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling, features_for
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.targets.opening import open_adapter
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.step import TrainingStep

_INSTALLED = load_plugins().registry
PAIRS = [(algorithm, family, "") for algorithm in _INSTALLED.trained_drafts() for family in _INSTALLED.names("target")]
# Shapes that are no algorithm's default, on a family whose layers have what they touch.
PAIRS += [("dflash", "gemma4", "anchor_predicts=False"), ("dspark", "llama", "confidence_head=False")]
PAIRS += [("eagle3", "qwen3", "qk_norm=False"), ("eagle3", "gemma4", "num_layers=2")]
PAIRS += [("eagle3", "gemma4", "vocab_size=24"), ("dspark", "gemma4", "vocab_size=24")]
PAIRS += [("dflash", "llama", "vocab_size=24")]
# Layers of another family than the target's.
PAIRS += [("dspark", "gemma4", "style='qwen3'"), ("eagle3", "qwen2", "style='llama'")]
STEPS = 10
NEW_TOKENS = 16
STOP = (1,)


@frozen(kw_only=True)
class Pair:
    """A draft after a few steps on the target's own answers; `losses` on that batch, before each of them."""

    target: Any
    draft: DraftModel
    losses: list[float]
    plain: dict[str, Completion]


def requests() -> list[Request]:
    return [
        Request(id=str(i), prompt_ids=tuple(3 + (5 * i + 3 * j) % 30 for j in range(3 + 2 * i)), seed=i)
        for i in range(4)
    ]


def decoded(target: Any, proposer: Proposer | None, temperature: float = 0.0) -> dict[str, Completion]:
    found = decode(
        target.model, proposer, requests(), sampling=Sampling(temperature=temperature), stop_ids=STOP,
        max_new_tokens=NEW_TOKENS, batch_size=3, max_length=64,
    )  # fmt: skip
    return {completion.id: completion for completion in found}


def train(draft: DraftModel, target: Any, answers: Sequence[Completion], registry: Registry) -> list[float]:
    """A few steps on one batch, with every term the draft's rows allow; the batch's loss before each."""
    samples = []
    for answer in answers:
        ids = torch.tensor(answer.prompt_ids + answer.output_ids)
        supervised = torch.arange(len(ids)) >= len(answer.prompt_ids)
        samples.append(Sample(id=answer.id, input_ids=ids, loss_mask=supervised, original_length=len(ids)))
    source = OnlineFeatures(samples, target.model, draft.describe().taps)
    host = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=tuple(range(len(samples))))]
    batch = host.to_draft_batch(source, torch.device("cpu"))
    rows = draft(batch)
    terms = {
        "ce": rows.target_ids is not None,
        "tv": rows.target_hidden is not None,
        "confidence": "confidence_logits" in rows.extras,
    }
    loss = LossOptions(terms={name: 1.0 for name, possible in terms.items() if possible})
    step = TrainingStep(draft, build_engine(loss, registry))
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        result = step(batch)
        losses.append(float(result.total.detach() / result.denominator))
        optimizer.zero_grad()
        (result.total / result.denominator).backward()
        optimizer.step()
    return losses


@pytest.fixture(scope="module")
def pairs(tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry) -> Any:
    """pairs(algorithm, family, option), each made once."""

    @cache
    def make(algorithm: str, family: str, option: str) -> Pair:
        target = tiny_target(family)
        name, _, value = option.partition("=")
        chosen = {name: ast.literal_eval(value)} if name else {}
        if name == "style":
            layer = LayerOptions(style=chosen.pop("style"))
            target = evolve(target, adapter=open_adapter(target.where, registry=registry, draft_layer=layer))
        draft, plain = tiny_draft(algorithm, target, **chosen), decoded(target, None)
        losses = train(draft, target, list(plain.values()), registry)
        return Pair(target=target, draft=draft.eval(), losses=losses, plain=plain)

    return make


@pytest.fixture(params=PAIRS, ids=lambda pair: "-".join(part for part in pair if part))
def pair(request: pytest.FixtureRequest, pairs: Any) -> Pair:
    made: Pair = pairs(*request.param)
    return made


def test_training_lowers_the_loss_and_leaves_the_targets_weights_alone(pair: Pair) -> None:
    assert pair.losses[1] < pair.losses[0], "one step"
    assert pair.losses[-1] < 0.95 * pair.losses[0], "a few"
    assert torch.equal(pair.draft.embed_tokens.weight, pair.target.model.embedding_weight())
    head_VH, vocabulary = pair.target.model.head_weight(), pair.draft.vocabulary
    assert torch.equal(pair.draft.lm_head.weight, head_VH if vocabulary is None else head_VH[vocabulary.ids])


def test_greedy_speculative_output_is_plain_greedy_output(pair: Pair) -> None:
    fast = decoded(pair.target, pair.draft.proposer())
    assert {name: done.output_ids for name, done in fast.items()} == {
        name: done.output_ids for name, done in pair.plain.items()
    }
    rounds = [r for done in fast.values() for r in done.rounds]
    assert any(r.accepted_draft_length > 0 for r in rounds), "or nothing was tested"
    assert any(r.accepted_draft_length < r.proposal_length for r in rounds)


def test_greedy_output_with_trees_is_plain_greedy_output(pair: Pair, registry: Registry) -> None:
    if not registry.get("draft", pair.draft.describe().algorithm).proposes_trees:
        with pytest.raises(NotImplementedError, match="chains only"):
            pair.draft.tree_proposer(12)
        return
    fast = decoded(pair.target, pair.draft.tree_proposer(12))
    assert {name: done.output_ids for name, done in fast.items()} == {
        name: done.output_ids for name, done in pair.plain.items()
    }
    rounds = [r for done in fast.values() for r in done.rounds]
    assert {r.nodes for r in rounds} == {12}
    assert any(r.accepted_draft_length > 0 for r in rounds), "or nothing was tested"


def test_a_checkpoint_proposes_the_same(
    pair: Pair, registry: Registry, reloaded: Callable[..., DraftModel], tmp_path: Path
) -> None:
    save_draft(pair.draft, pair.target.adapter, tmp_path / "draft")
    adapter = draft_adapter(tmp_path / "draft", registry=registry)
    loaded = reloaded(pair.draft, adapter, tmp_path / "again")
    assert loaded.describe() == pair.draft.describe()
    saved, read = (propose_twice(draft, pair.target, [0, 1, 2]) for draft in (pair.draft, loaded))
    for one, other in zip(saved, read, strict=True):
        same(one, other)


def test_proposals_do_not_depend_on_what_else_is_in_the_batch(pair: Pair) -> None:
    together = propose_twice(pair.draft, pair.target, [0, 1, 2])
    for sequence in range(3):
        for first, second in zip(propose_twice(pair.draft, pair.target, [sequence]), together, strict=True):
            same(first, row(second, sequence))


@torch.no_grad()
def propose_twice(draft: DraftModel, target: Any, sequences: list[int]) -> list[Proposal]:
    """Two rounds for some of three ragged sequences, of which each commits another number of tokens between them."""
    taps, proposer = draft.describe().taps, draft.proposer()
    width, batch = proposer.max_tokens, len(sequences)
    prompts, kept = [3, 9, 6], [1, width + 1, 2]
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 39, (3, 10 + width + 2), generator=generator)
    uniforms = torch.rand(2, 3, width, generator=generator)
    features = features_for(proposer, target.model.features(ids, torch.ones_like(ids), None, None, taps))[sequences]
    ids, uniforms = ids[sequences], uniforms[:, sequences]
    lengths = torch.tensor([prompts[s] for s in sequences])
    committed = torch.tensor([min(kept[s], width + 1) for s in sequences])
    each, limits = torch.arange(batch), torch.full((batch,), width)
    slots = each + 1  # one slot stays free, so that slots are no view of all of them
    proposer.open_slots(batch + 1, 64)
    longest = int(lengths.max())
    prompt = ids[:, :longest].masked_fill(torch.arange(longest) >= lengths[:, None], 0)
    seen = features[:, :longest].masked_fill((torch.arange(longest) >= lengths[:, None])[..., None], 0.0)
    proposer.start(slots, prompt, lengths, ids[each, lengths], seen)
    first = proposer.propose(slots, limits, Sampling(temperature=1.0), uniforms[0], STOP)
    steps = torch.arange(width + 1)
    past = steps >= committed[:, None]
    verified = lengths[:, None] + steps
    proposer.accept(
        slots,
        ids[each[:, None], verified + 1].masked_fill(past, 0),
        committed,
        features[each[:, None], verified].masked_fill(past[..., None], 0.0),
    )
    return [first, proposer.propose(slots, limits, Sampling(temperature=1.0), uniforms[1], STOP)]


def row(proposal: Proposal, index: int) -> Proposal:
    """One slot's proposal."""

    def of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[index : index + 1]

    return Proposal(
        tokens=proposal.tokens[index : index + 1],
        lengths=proposal.lengths[index : index + 1],
        probabilities=of(proposal.probabilities),
        confidence=of(proposal.confidence),
    )


def same(one: Proposal, other: Proposal) -> None:
    """Equal tokens, and equal up to rounding, where something is proposed: what stands past that is undefined."""
    assert torch.equal(one.lengths, other.lengths)
    assert (one.probabilities is None) == (other.probabilities is None)
    assert (one.confidence is None) == (other.confidence is None)
    for index, length in enumerate(one.lengths.tolist()):
        assert torch.equal(one.tokens[index, :length], other.tokens[index, :length])
        for name in ("probabilities", "confidence"):
            mine, theirs = getattr(one, name), getattr(other, name)
            if mine is not None:
                torch.testing.assert_close(mine[index, :length], theirs[index, :length], rtol=1e-4, atol=1e-5)
