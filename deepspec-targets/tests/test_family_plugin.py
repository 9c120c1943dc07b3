"""The example plugin with a family of its own: what holds of every family's targets and blocks holds of it."""

from pathlib import Path
from typing import Any

import pytest
import test_families
import test_family_blocks
from attrs import evolve
from plugin_on_path import install_project
from transformers import Olmo2Config, Olmo3Config

from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.public_imports import check_public_imports

OLMO = Path(__file__).parents[2] / "examples" / "plugins" / "deepspec-olmo"
PATTERN = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_window": 4}
SHAPES = {
    "olmo2": (Olmo2Config, {}),
    "olmo2-bias": (
        Olmo2Config,
        {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "olmo3": (Olmo3Config, PATTERN),
}


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The installed plugins and this one, which no other test file sees."""
    with pytest.MonkeyPatch.context() as patch:
        install_project(OLMO, tmp_path_factory.mktemp("site"), patch)
        found = load_plugins().registry
        found.load("target", "olmo")
        return found


@pytest.fixture(params=SHAPES)
def family(request: pytest.FixtureRequest, families: dict[str, Any]) -> Any:
    config_class, more = SHAPES[request.param]
    common = {key: families["llama"].settings[key] for key in families["llama"].settings if key != "rope_parameters"}
    return evolve(families["llama"], adapter="olmo", config_class=config_class, settings=common | more, full_layer=2)


@pytest.fixture
def dense_family(family: Any) -> Any:
    return family


@pytest.fixture
def target(family: Any, adapter: Any) -> TransformersTarget:
    return TransformersTarget(family.model(), adapter.architecture)


test_loading = test_families.test_a_saved_target_loads_and_is_checked_strictly
test_adapter = test_family_blocks.test_it_is_a_target_adapter_that_supports_its_targets
test_embedding_and_norm = test_family_blocks.test_the_embedding_and_final_norm_are_the_targets
test_new_weights = test_family_blocks.test_new_weights_start_as_published
test_config = test_family_blocks.test_transformers_reads_the_config_back_and_builds_the_blocks_shapes


def test_it_is_written_against_public_names_of_core_alone() -> None:
    check_public_imports(OLMO / "src")
    assert "deepspec_targets" not in "".join(path.read_text() for path in OLMO.rglob("*.py"))
    assert "deepspec-targets" not in (OLMO / "pyproject.toml").read_text()
