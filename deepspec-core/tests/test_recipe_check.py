"""A recommended recipe is as strict as a run file: its mistakes are its plugin's, told before a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import asdict, evolve, field, frozen
from attrs.validators import ge

from deepspec_core.config.recipe_check import CheckedRecipe, check_written, checked_recipe
from deepspec_core.errors import ConfigError, PluginError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.specs import DraftModelSpec, Recipe

PLUGIN = """
from test_recipe_check import WideOptions

@hookimpl
def deepspec_draft_models():
    return [
        DraftModelSpec(
            name="wide", summary="", build="a:b", options=WideOptions, class_suffix="WideModel", options_of="a:c",
        )
    ]
"""


@frozen(kw_only=True)
class HeadOptions:
    """A table of its own."""

    rank: int = field(default=8, validator=ge(0))


@frozen(kw_only=True)
class WideOptions:
    """Options of which two must be given."""

    mask_token_id: int
    size: int
    head: HeadOptions = HeadOptions()
    sizes: tuple[int, ...] = (1,)


@pytest.fixture
def check(toy: Any) -> Any:
    """check(options=..., loss=..., train=...): the recipe of an installed plugin's draft type, checked."""
    toy.add("fake-wide", PLUGIN)
    registry = load_plugins().registry
    spec = registry.get("draft", "wide")

    def checked(**parts: Any) -> CheckedRecipe:
        return checked_recipe(evolve(spec, recommended=Recipe(evidence="Better.", **parts)), registry)

    return checked


def test_tables_become_what_the_draft_type_takes(check: Any) -> None:
    found = check(options={"head": {"rank": 64}, "sizes": (2, 3)}, loss={"weighting": {"type": "uniform"}})
    assert asdict(found.options["head"]) == {"rank": 64}
    assert found.options["sizes"] == (2, 3)
    assert found.loss == {"weighting": {"type": "uniform"}}
    assert found.train == {}
    assert check(train={"optimizer": "muon", "betas": (0.9, 0.95)}).train == {"optimizer": "muon", "betas": [0.9, 0.95]}
    found = check(options={"head": HeadOptions(rank=64), "size": 4})
    assert asdict(found.options["head"]) == {"rank": 64}
    assert found.options["size"] == 4


@pytest.mark.parametrize(
    ("parts", "where", "says"),
    [
        ({"options": {"hed": {"rank": 64}}}, "options.hed", "unknown key"),
        ({"options": {"head": {"rnk": 64}}}, "options.head.rnk", "unknown key"),
        ({"options": {"head": {"rank": -1}}}, "options.head.rank", "wrong value"),
        ({"options": {"head": 64, "size": 1}}, "options.head", "wrong value"),
        ({"options": {"mask_token_id": 7}}, "options.mask_token_id", "unknown key"),
        ({"options": {"type": "wide"}}, "options.type", "unknown key"),
        ({"options": {"size": None}}, "options.size", "a run file cannot contain None"),
        ({"loss": {"weigting": {"type": "uniform"}}}, "loss.weigting", "unknown key"),
        ({"loss": {"weighting": {"type": "nobody"}}}, "loss.weighting.type", "nobody"),
        ({"loss": {"terms": {"ce": "much"}}}, "loss.terms.ce", "wrong value"),
        ({"loss": {"terms": {"ce": 0.0}}}, "loss.terms", "nothing to train on"),
        ({"train": {"optimiser": "muon"}}, "train.optimiser", "unknown key"),
        ({"train": {"optimizer": "moun"}}, "train.optimizer", "wrong value"),
        ({"train": {"lr": -1.0}}, "train.lr", "wrong value"),
        ({"train": {"lr": None}}, "train.lr", "a run file cannot contain None"),
    ],
)
def test_mistakes_are_the_plugin_s(check: Any, parts: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(PluginError, match="the recommended recipe of draft type 'wide' cannot be used") as caught:
        check(**parts)
    assert caught.value.where == f"fake-wide: recommended of 'wide', {where}"
    assert says in caught.value.render()


@pytest.mark.parametrize("evidence", ["", " ", "two\nlines", "\x1b[2J", "\udc80", 3])
def test_evidence_is_a_line_that_a_file_can_hold(evidence: Any) -> None:
    with pytest.raises(ValueError, match="evidence"):
        Recipe(evidence=evidence, train={"optimizer": "muon"})


def test_a_recipe_sets_something_and_is_for_training() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        Recipe(evidence="Better.")
    recipe = Recipe(evidence="Better.", train={"optimizer": "muon"})
    with pytest.raises(ValueError, match="a recipe is for training"):
        DraftModelSpec(name="copies", summary="", build="a:b", trained=False, recommended=recipe)


def test_a_key_that_is_no_text_is_refused_where_it_stands() -> None:
    with pytest.raises(TypeError):
        Recipe(evidence="Better.", options={1: 2})  # type: ignore[dict-item]


def test_what_the_user_gave_is_not_blamed_on_the_plugin(toy: Any, tmp_path: Path) -> None:
    toy.add("fake-wide", PLUGIN)
    plugins = load_plugins()
    spec = plugins.registry.get("draft", "wide")
    text = (
        '[run]\nname = "r"\noutput = "runs/{}"\nstages = ["train"]\n[target]\nmodel = "m"\nlayers = [1]\n'
        '[data]\nsources = [{{path = "rows.jsonl"}}]\n[features]\nmode = "online"\n'
        '[draft]\ntype = "wide"\nmask_token_id = 1\n[loss]\nterms = {{ce = 1.0}}\n'
    )
    check_written(text.format("r"), spec, recommended=True, folder=tmp_path, plugins=plugins)
    with pytest.raises(ConfigError) as caught:
        check_written(text.format("x" * 300), spec, recommended=True, folder=tmp_path, plugins=plugins)
    assert caught.value.where == "run.output"
