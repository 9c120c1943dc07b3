"""The example plugin with a family of its own: every algorithm works on it as on the families of deepspec-targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_every_pair as every_pair
from plugin_on_path import install_project

from deepspec_core.contracts.draft import DraftModel
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry

OLMO = Path(__file__).parents[1] / "examples" / "plugins" / "deepspec-olmo"
# Both config classes; drafts of both are of one.
PAIRS = [*((algorithm, "olmo") for algorithm in load_plugins().registry.trained_drafts()), ("dflash", "olmo-3")]


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The installed plugins and this one, which no other test file sees."""
    with pytest.MonkeyPatch.context() as patch:
        install_project(OLMO, tmp_path_factory.mktemp("site"), patch)
        found = load_plugins().registry
        found.load("target", "olmo")
        return found


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(
    request: pytest.FixtureRequest,
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
) -> every_pair.Pair:
    algorithm, family = request.param
    target = tiny_target(family)
    draft, plain = tiny_draft(algorithm, target), every_pair.decoded(target, None)
    losses = every_pair.train(draft, target, list(plain.values()), registry)
    return every_pair.Pair(target=target, draft=draft.eval(), losses=losses, plain=plain)


test_it_learns = every_pair.test_training_lowers_the_loss_and_leaves_the_targets_weights_alone
test_it_decodes_losslessly = every_pair.test_greedy_speculative_output_is_plain_greedy_output
test_its_checkpoint_proposes_the_same = every_pair.test_a_checkpoint_proposes_the_same
test_its_proposals_do_not_depend_on_neighbours = every_pair.test_proposals_do_not_depend_on_what_else_is_in_the_batch


def test_a_draft_of_either_config_class_says_the_same_class(pair: every_pair.Pair) -> None:
    assert pair.draft.describe().class_name.startswith("Olmo2")
    assert pair.target.adapter.draft_config(2, {}).model_type == "olmo2"
