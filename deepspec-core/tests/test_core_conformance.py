"""What core's own loss terms, weightings and cache formats keep, by the suites that any plugin is tested with."""

import pytest

from deepspec_core.plugins.registry import Registry
from deepspec_core.testing import CacheFormatSuite, LossSuite, WeightingSuite, broken_by

TERMS = ("ce", "soft_ce", "kl", "tv", "lk", "confidence")
WEIGHTINGS = {"uniform": {}, "decay": {"gamma": 4.0}, "d-pace": {}}


def test_all_of_core_is_here(registry: Registry) -> None:
    assert set(TERMS) <= set(registry.names("loss"))
    for kind, names in (("loss", TERMS), ("weighting", WEIGHTINGS), ("cache", ("hdf5", "deepspec-v2"))):
        own = {name for name in registry.names(kind) if registry.provider(kind, name) == "deepspec-core"}
        assert own == set(names)


@pytest.mark.parametrize("name", TERMS)
def test_loss_terms(name: str) -> None:
    class Term(LossSuite):
        component = name

    assert broken_by(Term) == {}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings(name: str) -> None:
    class Weighting(WeightingSuite):
        component = name
        options = WEIGHTINGS[name]

    assert broken_by(Weighting) == {}


class TestHDF5(CacheFormatSuite):
    component = "hdf5"


class TestBinaryV2(CacheFormatSuite):
    component = "deepspec-v2"
    dtypes = ("bfloat16",)
