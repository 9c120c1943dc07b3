"""The example plugin with Medusa heads, the user of heads a slot and of the last hidden state: everything that holds of
any draft, the loss against a loop, sampling with chains and trees, and a run whose accepted length rises.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_every_pair as every_pair
import test_lossless_sampling as sampling
import torch
import torch.nn.functional as F
from deepspec_medusa.draft import MedusaDraft
from deepspec_medusa.options import MedusaOptions
from plugin_on_path import install_project
from safetensors.torch import load_file

from deepspec_core.cli.main import main
from deepspec_core.config.schema import LossOptions, WeightingOptions
from deepspec_core.contracts.draft import DraftBatch, DraftModel, Sample
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_core.training.loader import MicroBatches, Plan

MEDUSA = Path(__file__).parents[1] / "examples" / "plugins" / "deepspec-medusa"


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The installed plugins and this one, which no other test file sees."""
    with pytest.MonkeyPatch.context() as patch:
        install_project(MEDUSA, tmp_path_factory.mktemp("site"), patch)
        return load_plugins().registry


@pytest.fixture(scope="module", params=["qwen3", "gemma4"])
def pair(
    request: pytest.FixtureRequest,
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
) -> every_pair.Pair:
    """Heads after a few steps on a target, one family with soft-capped logits and sliding windows."""
    target = tiny_target(request.param)
    draft, plain = tiny_draft("medusa", target), every_pair.decoded(target, None)
    losses = every_pair.train(draft, target, list(plain.values()), registry)
    return every_pair.Pair(target=target, draft=draft.eval(), losses=losses, plain=plain)


test_it_learns = every_pair.test_training_lowers_the_loss_and_leaves_the_targets_weights_alone
test_it_decodes_losslessly = every_pair.test_greedy_speculative_output_is_plain_greedy_output
test_its_trees_are_lossless = every_pair.test_greedy_output_with_trees_is_plain_greedy_output
test_its_checkpoint_proposes_the_same = every_pair.test_a_checkpoint_proposes_the_same
test_its_proposals_do_not_depend_on_neighbours = every_pair.test_proposals_do_not_depend_on_what_else_is_in_the_batch


def batch_of(draft: MedusaDraft, target: Any) -> DraftBatch:
    samples = []
    for number, length in enumerate((9, 14, 6)):
        ids = (torch.arange(length) * 7 + number * 5) % 38 + 2
        supervised = torch.arange(length) >= length // 3
        samples.append(Sample(id=str(number), input_ids=ids, loss_mask=supervised, original_length=length))
    source = OnlineFeatures(samples, target.model, draft.taps)
    host = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=(0, 1, 2))]
    return host.to_draft_batch(source, torch.device("cpu"))


def by_a_loop(draft: MedusaDraft, batch: DraftBatch, decay: float) -> torch.Tensor:
    """sum over positions t and heads k of decay ** k * cross-entropy of token t + 2 + k, over the sum of decay ** k."""
    total, weights = torch.zeros(()), 0.0
    for sequence, anchor in zip(batch.prepared["sequence"], batch.prepared["anchors"], strict=True):
        hidden_H = batch.features.last_hidden[sequence, anchor - 1]
        for head in range(draft.options.num_heads):
            at = int(anchor) + 1 + head
            if at < batch.input_ids.shape[1] and batch.loss_mask[sequence, at]:
                block_H = F.silu(draft.blocks_KHH[head] @ hidden_H + draft.biases_KH[head])
                logits_V = draft.heads_KVH[head] @ (hidden_H + block_H)
                total = total + decay**head * F.cross_entropy(logits_V, batch.input_ids[sequence, at])
                weights += decay**head
    return total / weights


@pytest.mark.parametrize("kernels", ["plain", "eager"])
@pytest.mark.parametrize("chunk_rows", [4, None])
def test_the_loss_and_its_gradients_are_those_of_a_loop(
    tiny_target: Callable[..., Any], registry: Registry, kernels: str, chunk_rows: int | None
) -> None:
    target = tiny_target("qwen3")
    torch.manual_seed(0)
    draft = MedusaDraft(MedusaOptions(num_heads=3), target.adapter, (1, 3))
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    batch = batch_of(draft, target)
    weighting = WeightingOptions(type="decay", options=DecayOptions(gamma=-1 / math.log(0.8)))
    loss = LossOptions(terms={"ce": 1.0}, weighting=weighting, kernels=kernels, chunk_rows=chunk_rows)
    result = build_engine(loss, registry)(draft(batch), draft.heads(), with_metrics=True)
    expected = by_a_loop(draft, batch, 0.8)
    torch.testing.assert_close(result.total / result.denominator, expected)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    found, wanted = (torch.autograd.grad(one, parameters) for one in (result.total / result.denominator, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert {"accuracy@0", "accuracy@1", "accuracy@2", "accept_rate@2"} <= set(result.metrics)


@pytest.mark.parametrize("tree_nodes", [None, 6], ids=["chain", "tree"])
def test_sampling_is_the_targets(tree_nodes: int | None, tiny_target: Callable[..., Any], registry: Registry) -> None:
    """The first three tokens at temperature 1, with heads that have other opinions than the target."""
    target = tiny_target("qwen3", vocab_size=8, hidden_size=16, num_hidden_layers=6)
    torch.manual_seed(1)
    draft = with_large_weights(MedusaDraft(MedusaOptions(num_heads=2), target.adapter, ()))
    proposer = draft.proposer() if tree_nodes is None else draft.tree_proposer(tree_nodes)
    plain = sampling.first_tokens(target, None, first_seed=0)
    fast = sampling.first_tokens(target, proposer, first_seed=sampling.DRAWS)
    assert sampling.chi_square_per_degree(fast, plain) < 1.5


@pytest.mark.slow
def test_a_run_raises_the_accepted_length(
    finished: Path, tmp_path: Path, example_plugin: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, on the cache of another draft's run and its prompts; then the same heads propose trees.

    Untrained heads propose the last committed token again: their accepted length is near 1.
    """
    example_plugin("deepspec-medusa")
    left = finished.parent / "runs" / "quickstart-dflash-smoke"
    text = finished.read_text().replace('["regenerate", "cache", "train", "evaluate"]', '["train", "evaluate"]')
    before, _, after = text.replace("[cache]\n", f'[cache]\npath = "{left / "cache"}"\n').partition("[draft]")
    run_file = tmp_path / "medusa.toml"
    run_file.write_text(f'{before}[draft]\ntype = "medusa"\nnum_heads = 2\n\n[train]{after.partition("[train]")[2]}')
    task = f'["{left / "regenerate" / "conversations.jsonl"}"]'
    small = ("run.threads=1", "train.lr=3e-2", "evaluate.temperature=[0.0]", "evaluate.batch_size=4")
    small = (*small, f"evaluate.tasks={task}", "evaluate.max_new_tokens=32")
    run = ["run", str(run_file), "--smoke", *(word for text in small for word in ("--set", text))]
    folder = tmp_path / "runs" / "quickstart-dflash-smoke"
    accepted = []
    for more in ([], ["--set", "draft.tree={nodes=6}", "--force", "evaluate"]):
        assert main([*run, *more]) == 0, capsys.readouterr().err
        report = json.loads((folder / "metrics.json").read_text())
        (result,) = report["results"]
        assert result["mismatches"] == []
        accepted.append(result["acceptance_length"])
    assert accepted[1] > accepted[0] > 1.5
    assert (report["draft"]["algorithm"], report["draft"]["taps"]) == ("medusa", [])
    stored = load_file(folder / "draft" / "model.safetensors")
    assert stored["heads.weight"].shape == (2, *stored["lm_head.weight"].shape)
    assert not torch.equal(stored["heads.weight"][0], stored["heads.weight"][1]), "each is trained on its own slot"
    assert not torch.equal(stored["heads.weight"][0], stored["lm_head.weight"])
