"""The example plugin with DFlash 2: everything that holds of any draft, on a family with soft-capped logits and sliding
windows; sampling; windows; and a run from the command line on another draft's cache.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_every_pair as every_pair
import test_lossless_sampling as sampling
import torch
from plugin_on_path import install_project
from safetensors.torch import load_file

from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.random_batches import with_large_weights

DFLASH2 = Path(__file__).parents[1] / "examples" / "plugins" / "deepspec-dflash2"
SMALL = {"selector_rank": 8, "selector_top_k": 4, "conv_group_size": 8, "num_layers": 1}


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The installed plugins and this one, which no other test file sees."""
    with pytest.MonkeyPatch.context() as patch:
        install_project(DFLASH2, tmp_path_factory.mktemp("site"), patch)
        return load_plugins().registry


@pytest.fixture(scope="module")
def pair(tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry) -> every_pair.Pair:
    """A draft after a few steps on a target."""
    target = tiny_target("gemma4")
    draft, plain = tiny_draft("dflash2", target, **SMALL), every_pair.decoded(target, None)
    with pytest.warns(RuntimeWarning, match="selector_scores"):
        losses = every_pair.train(draft, target, list(plain.values()), registry)
    torch.nn.init.normal_(draft.candidate_selector.successor_codebook)  # opinions, which its loss was not there to give
    return every_pair.Pair(target=target, draft=draft.eval(), losses=losses, plain=plain)


test_it_learns = every_pair.test_training_lowers_the_loss_and_leaves_the_targets_weights_alone
test_it_decodes_losslessly = every_pair.test_greedy_speculative_output_is_plain_greedy_output
test_its_trees_are_lossless = every_pair.test_greedy_output_with_trees_is_plain_greedy_output
test_its_checkpoint_proposes_the_same = every_pair.test_a_checkpoint_proposes_the_same
test_its_proposals_do_not_depend_on_neighbours = every_pair.test_proposals_do_not_depend_on_what_else_is_in_the_batch


@pytest.mark.parametrize("tree_nodes", [None, 6], ids=["chain", "tree"])
def test_sampling_is_the_targets(
    tree_nodes: int | None, tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel]
) -> None:
    """The first three tokens at temperature 1, of a draft that can propose 4 of 8 tokens, by its own opinion."""
    target = tiny_target("qwen3", vocab_size=8, hidden_size=16, num_hidden_layers=6)
    draft = with_large_weights(tiny_draft("dflash2", target, **SMALL)).eval()
    proposer = draft.proposer() if tree_nodes is None else draft.tree_proposer(tree_nodes)
    plain = sampling.first_tokens(target, None, first_seed=0)
    fast = sampling.first_tokens(target, proposer, first_seed=sampling.DRAWS)
    assert sampling.chi_square_per_degree(fast, plain) < 1.5


@pytest.mark.slow
def test_a_run_with_a_window_trains_both_parts(
    finished: Path, tmp_path: Path, example_plugin: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """The plugin's own run file, on the cache of another draft's run."""
    example_plugin("deepspec-dflash2")
    left = finished.parent / "runs" / "quickstart-dflash-smoke"
    text = (DFLASH2 / "train.toml").read_text().replace("../../../runs", "runs")
    text = text.replace('["regenerate", "cache", "train", "evaluate"]', '["train", "evaluate"]')
    run_file = tmp_path / "dflash2.toml"
    run_file.write_text(text.replace("[cache]\n", f'[cache]\npath = "{left / "cache"}"\n'))
    task = f'["{left / "regenerate" / "conversations.jsonl"}"]'
    small = ("run.threads=1", "evaluate.temperature=[0.0]", "evaluate.batch_size=4", "evaluate.max_new_tokens=16")
    small = (*small, f"evaluate.tasks={task}", "draft.layer.window=64", "draft.num_layers=1")
    run = ["run", str(run_file), "--smoke", *(word for text in small for word in ("--set", text))]
    assert main(run) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "dflash2-smoke"
    report = json.loads((folder / "metrics.json").read_text())
    (result,) = report["results"]
    assert result["mismatches"] == []
    assert report["draft"]["algorithm"] == "dflash2"
    config = json.loads((folder / "draft" / "config.json").read_text())
    assert (config["sliding_window"], config["layer_types"]) == (64, ["sliding_attention"])
    stored = load_file(folder / "draft" / "model.safetensors")
    new_2tH = torch.tensor([1.0, 0.0])[None, :, None]
    assert ((stored["layers.0.attention_conv.base_kernel"] - new_2tH).abs().amax((0, 2)) > 0).all(), "both taps"
    assert stored["layers.0.mlp_conv.kernel_projection.weight"].any()
    assert stored["candidate_selector.successor_codebook"].any()
    # The selector's loss term without a selector is refused before the first step.
    assert main([*run, "--set", "draft.selector_top_k=0", "--force", "train,evaluate"]) == 2
    assert "selector_scores" in capsys.readouterr().err
