"""What every target family keeps, kept by every shape of ours: features, slots, trees, and the blocks of drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deepspec_targets.plugin
from deepspec_core.contracts.target import TargetModel
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.testing import TargetAdapterSuite

# One shape of each family, together with every kind of layer. The other shapes are slow tests.
FIRST = ("qwen3-bias-sliding", "qwen2", "llama", "mistral-sliding", "gemma3", "gemma4-per-layer-inputs", "qwen3_moe")
OTHERS = (
    "qwen3", "qwen3-yarn", "qwen2-sliding", "llama-bias", "llama-linear", "mistral", "gemma4", "gemma4-own-values",
    "gemma4-unified", "gemma4-experts",
)  # fmt: skip
TEMPLATES = Path(__file__).parent / "chat_templates"
# Of Llama, models without the vocabulary of Llama 3 write ChatML.
WRITES_AS = {"qwen3_moe": "qwen3", "llama": "qwen2"}


@pytest.fixture(params=[*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def family(request: pytest.FixtureRequest, families: dict[str, Any]) -> Any:
    """Each shape of each family (conftest.py)."""
    return families[request.param]


def test_every_shape_is_here(families: dict[str, Any]) -> None:
    assert {*FIRST, *OTHERS} == families.keys()
    assert {families[name].adapter for name in FIRST} == {one.adapter for one in families.values()}


class TestFamilies(TargetAdapterSuite):
    """Targets stay in memory. test_families.py saves and loads them, whole and without a weight."""

    plugin = deepspec_targets.plugin
    test_missing_weights_are_refused = None

    @pytest.fixture(autouse=True)
    def each(self, family: Any) -> None:
        """The shape is the component's."""
        self.family, self.component = family, family.adapter
        self.layer, self.full_layer = family.layer, family.full_layer
        template = TEMPLATES / f"{WRITES_AS.get(family.adapter, family.adapter)}.jinja"
        self.template = template.read_text(encoding="utf-8")

    def config(self) -> Any:
        return self.family.config()

    def model(self) -> Any:
        return self.family.model()

    def target(self, model: Any) -> TargetModel:
        return TransformersTarget(model, self.adapter().architecture)
