"""For tests of plugins: a suite for each contract. A plugin's first test subclasses one and names its component."""

from deepspec_core.testing.cache_suite import CacheFormatSuite
from deepspec_core.testing.conformance import ContractBroken, broken_by
from deepspec_core.testing.draft_suite import DraftModelSuite
from deepspec_core.testing.export_suite import ExporterSuite
from deepspec_core.testing.loss_suite import LossSuite
from deepspec_core.testing.target_suite import TargetAdapterSuite
from deepspec_core.testing.task_suite import TaskSuite
from deepspec_core.testing.untrained_suite import UntrainedDraftSuite
from deepspec_core.testing.weighting_suite import WeightingSuite

__all__ = [
    "CacheFormatSuite",
    "ContractBroken",
    "DraftModelSuite",
    "ExporterSuite",
    "LossSuite",
    "TargetAdapterSuite",
    "TaskSuite",
    "UntrainedDraftSuite",
    "WeightingSuite",
    "broken_by",
]
