"""The whole DFlash 2 draft: it begins as DFlash, packs, walks, and says what it is as published drafts do.

Legend: B slots, K predictions of a block, H hidden size, C candidates, V vocabulary, r rank.
"""

import json
from collections import Counter
from pathlib import Path

import deepspec_dflash2.plugin
import pytest
import torch
from deepspec_dflash2.draft import DFlash2Draft
from deepspec_dflash2.options import DFlash2Options, is_dflash2, options_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import deepspec_dflash.plugin
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.rows import Rows
from deepspec_core.errors import CheckpointError, ConfigError
from deepspec_core.testing.core_registry import core_registry
from deepspec_core.testing.draft_checks import check_near, check_same_rows
from deepspec_core.testing.driven_proposer import GREEDY, SAMPLED, check_best_tree, started
from deepspec_core.testing.public_imports import check_public_imports
from deepspec_core.testing.random_batches import TAPS, padded_batch, prepare, ragged_samples, with_large_weights
from deepspec_core.testing.tiny_family import tiny_adapter
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.options import DFlashOptions

SMALL = {"block_size": 4, "num_layers": 2, "num_anchors": 8, "anchor_predicts": True}
OWN = {"conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5}
EXTRAS = ("selector_scores", "selector_tokens")


def made(**options: object) -> DFlash2Draft:
    torch.manual_seed(0)
    draft = DFlash2Draft(DFlash2Options(**{**SMALL, **OWN, **options}), tiny_adapter(softcap=4.0), TAPS)
    draft.adopt(torch.randn(64, 32), torch.randn(64, 32) * 32**-0.5)
    return draft


@pytest.fixture
def draft() -> DFlash2Draft:
    """Random weights, also where new drafts have zeros."""
    return with_large_weights(made()).eval()


def rows_of(draft: DFlashModel, **changes: object) -> Rows:
    return draft(padded_batch(draft, prepare(draft, ragged_samples()), **changes))


def test_a_new_draft_is_a_dflash_draft() -> None:
    new = made()
    plain = DFlashModel(DFlashOptions(**SMALL), tiny_adapter(softcap=4.0), TAPS)
    missing, unexpected = plain.load_state_dict(new.state_dict(), strict=False)
    assert missing == []
    assert {name.split(".")[0 if "selector" in name else 3] for name in unexpected} == {
        "candidate_selector", "around_attention", "around_mlp",
    }  # fmt: skip
    assert torch.equal(rows_of(new).hidden, rows_of(plain).hidden)
    assert torch.equal(started(new).propose(range(4)).tokens, started(plain).propose(range(4)).tokens)


def test_the_parts_can_be_left_out() -> None:
    neither = made(conv_kernel_size=0, selector_top_k=0)
    assert neither.state_dict().keys() == DFlashModel(DFlashOptions(**SMALL), tiny_adapter(), TAPS).state_dict().keys()
    assert rows_of(neither).extras == {}


def test_labels_are_candidates_and_the_others_the_heads_best(draft: DFlash2Draft) -> None:
    rows = rows_of(draft)
    best_RC = draft.known_logits(rows.hidden).topk(5).indices
    tokens_RC = rows.extras["selector_tokens"]
    inside_R = (best_RC == rows.target_ids[:, None]).any(-1)
    assert 0 < inside_R.sum() < len(inside_R)
    assert torch.equal(tokens_RC[inside_R], best_RC[inside_R])
    assert torch.equal(tokens_RC[~inside_R, :-1], best_RC[~inside_R, :-1])
    assert torch.equal(tokens_RC[~inside_R, -1], rows.target_ids[~inside_R])


@pytest.mark.parametrize("filler", [0.0, float("nan")])
def test_candidates_and_scores_do_not_depend_on_padding_or_packing(draft: DFlash2Draft, filler: float) -> None:
    tight = rows_of(draft)
    for other in (rows_of(draft, extra=9, filler=filler), rows_of(draft, rows=[[0], [1, 2, 3]], filler=filler)):
        check_same_rows(other, tight, 2e-6)
        assert torch.equal(other.extras["selector_tokens"], tight.extras["selector_tokens"])
        check_near(other.extras["selector_scores"], tight.extras["selector_scores"], 2e-6)


def walked(draft: DFlash2Draft, hidden_KH: Tensor, anchor: int, choose: list[int] | None = None) -> list[Tensor]:
    """The distribution [V] of each slot, by loops: after the most probable tokens, or after these."""
    selector, before, found = draft.candidate_selector, anchor, []
    for slot, hidden_H in enumerate(hidden_KH):
        logits_V = draft.logits(hidden_H)
        projected_r = selector.hidden_projection(hidden_H)
        scores_V = torch.full((64,), -torch.inf)
        for token in logits_V.argsort(descending=True)[:5].tolist():
            pair = selector.predecessor_codebook[before] * projected_r @ selector.successor_codebook[token]
            scores_V[token] = logits_V[token] + pair
        found.append(scores_V.softmax(0).detach())
        before = int(scores_V.argmax()) if choose is None else choose[slot]
    return found


@torch.no_grad()
def test_a_greedy_walk_takes_the_best_pair_at_each_step(draft: DFlash2Draft) -> None:
    torch.manual_seed(1)
    hidden_BKH, last_B = torch.randn(6, 4, 32), torch.arange(6)
    found = draft.proposer().tokens(hidden_BKH, last_B, torch.full((6,), 9), GREEDY, torch.rand(6, 4))
    expected = [[int(q_V.argmax()) for q_V in walked(draft, hidden_BKH[b], b)] for b in range(6)]
    assert found.tokens.tolist() == expected
    assert found.tokens.tolist() != draft.logits(hidden_BKH).argmax(-1).tolist(), "the selector changes nothing"


@torch.no_grad()
def test_a_sampled_walk_draws_from_what_it_says(draft: DFlash2Draft) -> None:
    """40,000 walks over the same hidden states: probabilities are a loop's, and two tokens' frequencies are theirs."""
    torch.manual_seed(2)
    draws, hidden_KH = 40_000, torch.randn(4, 32)[:2]
    draft.options = DFlash2Options(**{**SMALL, **OWN, "block_size": 2})
    proposer = draft.proposer()
    many = (hidden_KH.expand(draws, -1, -1), torch.full((draws,), 3), torch.full((draws,), 2))
    found = proposer.tokens(*many, SAMPLED, torch.rand(draws, 2, dtype=torch.float64))
    counts = Counter(map(tuple, found.tokens.tolist()))
    first_V = walked(draft, hidden_KH, 3)[0]
    total, cells = 0.0, 0
    for first in first_V.nonzero()[:, 0].tolist():
        row = int((found.tokens[:, 0] == first).int().argmax())
        second_V = walked(draft, hidden_KH, 3, choose=[first, 0])[1]
        torch.testing.assert_close(found.probabilities[row], torch.stack([first_V, second_V]), rtol=1e-4, atol=1e-6)
        for second in second_V.nonzero()[:, 0].tolist():
            expected = draws * float(first_V[first] * second_V[second])
            if expected > 5:
                total, cells = total + (counts[first, second] - expected) ** 2 / expected, cells + 1
    assert sum(counts.values()) == draws
    assert cells >= 10
    assert total / (cells - 1) < 2.0
    assert (found.probabilities > 0).sum(-1).max() == 5


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(temperature=0.7, top_k=3), Sampling(temperature=2.0)], ids=str)
@torch.no_grad()
def test_a_tree_has_the_most_probable_walks(draft: DFlash2Draft, sampling: Sampling) -> None:
    trees, hidden_BKH = started(draft, tree_nodes=9), []
    walk = draft.walk
    draft.walk = lambda hidden: hidden_BKH.append(hidden) or walk(hidden)
    proposal = trees.propose(range(4), sampling)
    given, last_B = walk(hidden_BKH[0]), trees.proposer._last_S

    def after(slot: int, path: tuple[int, ...]) -> Tensor:
        scores_V = given(len(path), torch.full((4, 1), path[-1]) if path else last_B[:, None])[slot, 0]
        scores_V = scores_V / sampling.temperature
        kept = scores_V.topk(sampling.top_k or 5).indices
        return torch.full((64,), -torch.inf).scatter(0, kept, scores_V[kept]).softmax(0)

    for slot in range(4):
        check_best_tree(proposal, slot, lambda path, slot=slot: after(slot, path), nodes=9, longest=4)


def test_config_and_weights_are_named_as_published(tmp_path: Path) -> None:
    draft = made(block_size=8, anchor_predicts=False, mask_token_id=63)
    save_draft(draft, tiny_adapter(), tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["architectures"] == ["DFlash2DraftModel"]
    assert config["dflash_config"] == {
        "block_size": 8, "conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 5,
        "target_layer_ids": list(TAPS), "mask_token_id": 63,
    }  # fmt: skip
    shapes = {name: tuple(weight.shape) for name, weight in load_file(tmp_path / "draft" / "model.safetensors").items()}
    assert {name: shape for name, shape in shapes.items() if "selector" in name} == {
        "candidate_selector.hidden_projection.weight": (6, 32),
        "candidate_selector.predecessor_codebook": (64, 6),
        "candidate_selector.successor_codebook": (64, 6),
    }
    for layer in range(2):
        for part in ("attention_conv", "mlp_conv"):
            assert shapes[f"layers.{layer}.{part}.base_kernel"] == (2, 2, 32)
            assert shapes[f"layers.{layer}.{part}.kernel_projection.weight"] == (2 * 2 * 4, 32)


def test_a_published_config_is_read(tmp_path: Path) -> None:
    """One without the keys that only training reads, and a block's first slot predicts nothing."""
    own = {
        "block_size": 8, "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16,
        "target_layer_ids": [1, 9, 17], "mask_token_id": 151669,
    }  # fmt: skip
    config = {"architectures": ["DFlash2DraftModel"], "num_hidden_layers": 5, "dflash_config": own}
    assert is_dflash2(config)
    assert options_of(config) == (DFlash2Options(num_layers=5, mask_token_id=151669), (1, 9, 17))
    del own["selector_rank"]
    with pytest.raises(CheckpointError, match="selector_rank"):
        options_of(config)


def test_beside_dflash_which_takes_its_class_name_for_another_projects(tmp_path: Path) -> None:
    registry = core_registry(deepspec_dflash.plugin, deepspec_dflash2.plugin)
    assert "DFlash2DraftModel" in registry.get("draft", "dflash").elsewhere
    assert registry.recognise({"architectures": ["DFlash2DraftModel"]}).name == "dflash2"


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="conv_group_size"):
        made(conv_group_size=5)
    made(conv_group_size=5, conv_kernel_size=0)


def test_a_checkpoint_that_lacks_a_part_is_refused(draft: DFlash2Draft, tmp_path: Path) -> None:
    folder, adapter = tmp_path / "draft", tiny_adapter(softcap=4.0)
    save_draft(draft, adapter, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in weights.items() if "selector" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: candidate_selector\.hidden_projection"):
        load_draft(folder, registry=core_registry(deepspec_dflash2.plugin), adapter=adapter)


def test_only_public_names_are_imported() -> None:
    check_public_imports(Path(__file__).parents[1])


def test_a_new_run_file_says_how_the_published_shape_is_written() -> None:
    """`deepspec init` and `deepspec config keys` say what the options class says of itself."""
    assert "`[draft.layer] window = 2048`" in str(DFlash2Options.__doc__)
