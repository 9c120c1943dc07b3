"""What every target family keeps, kept by every shape of ours: features, slots, trees, and the blocks of drafts."""

from __future__ import annotations

from typing import Any

import pytest

import deepspec_targets.plugin
from deepspec_core.contracts.target import TargetModel
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.testing import TargetAdapterSuite


class TestFamilies(TargetAdapterSuite):
    """Targets stay in memory. test_families.py saves and loads them, whole and without a weight."""

    plugin = deepspec_targets.plugin
    test_missing_weights_are_refused = None

    @pytest.fixture(autouse=True)
    def each(self, family: Any) -> None:
        """Each shape of each family (conftest.py)."""
        self.family, self.component = family, family.adapter
        self.layer, self.full_layer = family.layer, family.full_layer

    def config(self) -> Any:
        return self.family.config()

    def model(self) -> Any:
        return self.family.model()

    def target(self, model: Any) -> TargetModel:
        return TransformersTarget(model, self.adapter().architecture)
