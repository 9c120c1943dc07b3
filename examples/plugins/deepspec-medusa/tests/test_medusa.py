"""Medusa heads alone: what they are trained on, what they propose, and their checkpoints. Public names of core only.

The target's shape is of Qwen3, from deepspec-targets. Legend: K heads, V vocabulary.
"""

from pathlib import Path

import deepspec_medusa.plugin
import pytest
import torch
from deepspec_medusa.draft import MedusaDraft
from deepspec_medusa.options import MedusaOptions, is_medusa, options_of
from torch import Tensor
from torch.nn.functional import silu
from transformers import Qwen3Config

import deepspec_targets.plugin
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.sampling import draw
from deepspec_core.testing import DraftModelSuite
from deepspec_core.testing.core_registry import core_registry
from deepspec_core.testing.draft_checks import (
    check_frozen_heads,
    gradients_of,
    head_products,
    trained,
)
from deepspec_core.testing.driven_proposer import (
    GREEDY,
    SAMPLED,
    check_best_tree,
    check_same_proposals,
    prompts,
    started,
)
from deepspec_core.testing.public_imports import check_public_imports
from deepspec_core.testing.random_batches import features_of, padded_batch, prepare, ragged_samples, with_large_weights

REGISTRY = core_registry(deepspec_medusa.plugin, deepspec_targets.plugin)
HEADS = 3
SMALL = {"num_heads": HEADS, "num_anchors": 8}
NODES = 12


def adapter(**sizes: object) -> object:
    """Of a target of the size that random samples have: H 32, V 64."""
    config = Qwen3Config(hidden_size=32, vocab_size=64, num_hidden_layers=8, num_attention_heads=4, head_dim=8, **sizes)
    return REGISTRY.load("target", "qwen3")(config)


@pytest.fixture
def draft() -> MedusaDraft:
    """Random heads, which propose other tokens than the target."""
    torch.manual_seed(0)
    return with_large_weights(MedusaDraft(MedusaOptions(num_heads=HEADS, num_anchors=8), adapter(), ()))


def by_hand(draft: MedusaDraft, last_H: Tensor) -> Tensor:
    """Logits [K, V] after one hidden state, head by head."""
    heads = zip(draft.blocks_KHH, draft.biases_KH, draft.heads_KVH, strict=True)
    return torch.stack([head @ (last_H + silu(block @ last_H + bias)) for block, bias, head in heads])


def test_a_head_is_trained_on_the_token_so_far_after_the_targets_own(draft: MedusaDraft) -> None:
    samples = ragged_samples()
    prepared = prepare(draft, samples)
    rows = draft(padded_batch(draft, prepared))
    logits_NV, found = head_products(draft, rows), 0
    for sample, one in zip(samples, prepared, strict=True):
        for anchor, counted in zip(one.tensors["anchors"].tolist(), one.tensors["counted"].tolist(), strict=True):
            expected_KV = by_hand(draft, features_of(sample).last_hidden[anchor - 1])
            for head in range(sum(counted)):
                assert rows.slot[found] == head
                assert rows.target_ids[found] == sample.input_ids[anchor + 1 + head]
                # The target says what it thinks of a token at the position before it.
                judging = features_of(sample).last_hidden[anchor + head]
                assert torch.equal(rows.target_hidden[rows.target_index[found]], judging)
                torch.testing.assert_close(logits_NV[found], expected_KV[head], rtol=1e-4, atol=1e-5)
                found += 1
    assert found == len(rows.hidden) > 40


def test_a_batch_without_anchors_has_no_rows(draft: MedusaDraft) -> None:
    rows = draft(padded_batch(draft, prepare(draft, ragged_samples()[3:])))
    assert rows.hidden.shape == (0, 32)
    assert gradients_of(rows.hidden.sum(), draft).keys() == trained(draft).keys() - {"heads_KVH"}


def test_it_begins_as_the_target_whose_weights_stay(draft: MedusaDraft) -> None:
    check_frozen_heads(draft)
    new = MedusaDraft(MedusaOptions(num_heads=HEADS), adapter(), ())
    new.adopt(torch.randn(64, 32), torch.randn(64, 32))
    last_NH = torch.randn(5, 32)
    for logits_NV in new.logits(new.hidden(last_NH)).unbind(1):
        torch.testing.assert_close(logits_NV, new.lm_head(last_NH))


def test_logits_are_capped_as_the_targets(draft: MedusaDraft) -> None:
    draft.softcap = 0.5
    hidden_NKH = draft.hidden(torch.randn(4, 32))
    assert draft.logits(hidden_NKH).abs().max() <= 0.5 < (hidden_NKH[:, 0] @ draft.heads_KVH[0].T).abs().max()
    assert draft.heads().softcap == 0.5


def test_a_chain_has_a_token_of_each_head(draft: MedusaDraft) -> None:
    expected = {
        slot: by_hand(draft, features_of(sample).last_hidden[length - 1])
        for slot, (sample, length) in prompts().items()
    }
    driven = started(draft)
    greedy, sampled = (driven.propose(range(4), sampling) for sampling in (GREEDY, SAMPLED))
    for slot, logits_KV in expected.items():
        assert greedy.tokens[slot].tolist() == logits_KV.argmax(-1).tolist()
        torch.testing.assert_close(sampled.probabilities[slot], logits_KV.softmax(-1), rtol=1e-4, atol=1e-6)
    assert greedy.probabilities is None, "chosen, not drawn"
    assert torch.equal(sampled.tokens, draw(sampled.probabilities, driven.uniforms)), "a uniform number each"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(temperature=0.7, top_k=20)], ids=str)
def test_a_tree_has_the_most_probable_paths(draft: MedusaDraft, sampling: Sampling) -> None:
    """By the distributions that a chain is drawn from; at temperature 0, those at temperature 1."""
    chain = started(draft).propose(range(4), sampling if sampling.temperature else SAMPLED).probabilities
    trees = started(draft, tree_nodes=NODES).propose(range(4), sampling)
    for slot in range(4):
        check_best_tree(trees, slot, lambda path, slot=slot: chain[slot, len(path)], nodes=NODES, longest=HEADS)


@pytest.mark.parametrize("taps", [(), (1, 4)], ids=["no taps", "taps of others"])
def test_a_checkpoint_is_the_same_draft(draft: MedusaDraft, taps: tuple[int, ...], tmp_path: Path) -> None:
    draft.taps = taps
    save_draft(draft, adapter(), tmp_path / "draft")
    loaded: DraftModel = load_draft(tmp_path / "draft", registry=REGISTRY, adapter=adapter())
    assert loaded.describe() == draft.describe()
    assert loaded.state_dict().keys() == draft.state_dict().keys()
    check_same_proposals(loaded, draft)


def test_what_config_json_says(draft: MedusaDraft) -> None:
    config = {**draft.describe().config, "architectures": [draft.describe().class_name]}
    assert draft.describe().class_name == "Qwen3MedusaModel"
    assert is_medusa(config)
    assert not is_medusa({"architectures": ["Qwen3DFlashModel"]})
    assert options_of(config) == (draft.options, ())


class TestMedusa(DraftModelSuite):
    component = "medusa"
    plugin = deepspec_medusa.plugin
    options = SMALL


@pytest.mark.parametrize("bad", [{"num_heads": 0}, {"num_heads": 65}, {"num_anchors": 0}])
def test_options_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MedusaOptions(**bad)


def test_only_public_names_are_imported() -> None:
    check_public_imports(Path(__file__).parents[1])
