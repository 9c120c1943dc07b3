"""What plugins shape in a run file: their options are as strict as core's keys, and their defaults count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_file_loading import GOOD, Loader

from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.weighting_options import DecayOptions


def test_an_algorithm_says_what_it_is_trained_on_where_the_file_does_not(tmp_path: Path, toy: Any) -> None:
    toy.add(
        "fake-soft",
        """
        from attrs import frozen

        @frozen(kw_only=True)
        class SoftOptions:
            pass

        @hookimpl
        def deepspec_draft_models():
            return [
                DraftModelSpec(
                    name="soft", summary="", build="a:b", options=SoftOptions, class_suffix="SoftModel",
                    options_of="a:c", default_loss={"terms": {"soft_ce": 1.0}},
                )
            ]
        """,
    )
    load, soft = Loader(tmp_path, load_plugins()), GOOD.replace('"toy"', '"soft"')
    assert load(soft).loss.terms == {"soft_ce": 1.0}
    assert load(soft + "[loss]\nchunk_rows = 8\n").loss.terms == {"soft_ce": 1.0}
    assert load(soft + "[loss]\nterms = {tv = 2.0}\n").loss.terms == {"tv": 2.0}
    assert load(GOOD).loss.terms == {"ce": 1.0}
    assert list(load.problems(GOOD.replace('"toy"', '"nobody"'))) == ["draft.type"]


def test_mistakes_of_a_default_loss_are_the_plugin_s(tmp_path: Path, toy: Any) -> None:
    toy.add(
        "fake-soft",
        """
        @hookimpl
        def deepspec_draft_models():
            return [
                DraftModelSpec(
                    name="soft", summary="", build="a:b", class_suffix="SoftModel", options_of="a:c",
                    default_loss={"terms": {"so_ce": 1.0}, "weighting": {"type": "uniform"}},
                )
            ]
        """,
    )
    text = f'{GOOD.partition("[draft]")[0]}[draft]\ntype = "soft"\n'
    load = Loader(tmp_path, load_plugins())
    [(where, problem)] = load.problems(text).items()
    assert where == "fake-soft: default_loss of 'soft', loss.terms.so_ce"
    assert "the default loss of draft type 'soft' cannot be used" in problem.problem
    assert load(text + "[loss]\nterms = {ce = 1.0}\n").loss.terms == {"ce": 1.0}


@pytest.mark.parametrize(
    ("hook", "spec"),
    [
        ("cache_formats", "ComponentSpec"),
        ("feature_sources", "ComponentSpec"),
        ("tasks", "TaskSpec"),
    ],
)
def test_options_that_nothing_would_pass_are_refused(distributions: Any, hook: str, spec: str) -> None:
    distributions.add(
        "fake-more",
        f"""
        from attrs import frozen

        @frozen(kw_only=True)
        class Options:
            pass

        @hookimpl
        def deepspec_{hook}():
            return [{spec}(name="more", summary="", build="a:b", options=Options)]
        """,
    )
    [record] = [record for record in load_plugins().records if record.package == "fake-more"]
    assert record.status == "broken"
    assert "'more' has options, which nothing would pass" in str(record.reason)


def test_sections_that_plugins_shape_hold_their_own_typed_options(load: Loader) -> None:
    text = GOOD + (
        "head = {rank = 4}\nwidths = [1, 2]\ndropout = 1\nlayer = {num_heads = 2}\n"
        '[loss]\nterms = {ce = 1, tv = 0.5}\nweighting = {type = "decay", gamma = 2}\n'
    )
    file = load(text)
    assert file.draft.options.head.rank == 4
    assert file.draft.options.widths == (1, 2)
    assert type(file.draft.options.dropout) is float
    assert file.draft.layer.num_heads == 2
    assert file.loss.weighting.options == DecayOptions(gamma=2.0)
    assert file.loss.terms == {"ce": 1.0, "tv": 0.5}


def test_options_of_every_supported_type_are_strict(load: Loader, toy: Any) -> None:
    toy.add(
        "fake-rich",
        """
        from collections.abc import Mapping, Sequence
        from pathlib import Path
        from typing import Literal
        from attrs import field, frozen

        @frozen(kw_only=True)
        class RichOptions:
            mode: Literal["fast", "slow"] = "fast"
            either: int | str | tuple[int, ...] = 0
            scales: Sequence[float] = ()
            pairs: tuple[tuple[int, str], ...] = ()
            extra: Mapping[str, int] = field(factory=dict)
            where: Path | None = None
            low: int = 0
            high: int = field(default=1)

            @high.validator
            def _above(self, attribute, value):
                if value <= self.low:
                    raise ValueError("high must be above low")

        @hookimpl
        def deepspec_weightings():
            return [ComponentSpec(name="rich", summary="", build="a:b", options=RichOptions)]
        """,
    )
    load.plugins = load_plugins()

    def weighting(keys: str) -> str:
        return f'{GOOD}[loss]\nweighting = {{type = "rich", {keys}}}\n'

    options = load(
        weighting('either = [1], scales = [1, 2], pairs = [[1, "a"]], extra = {a = 1}, where = "x/y"')
    ).loss.weighting.options
    assert (options.either, options.scales, options.pairs) == ((1,), (1.0, 2.0), ((1, "a"),))
    assert (options.extra, options.where) == ({"a": 1}, Path("x/y"))
    text = weighting('mode = "fst", either = 1.5, scales = "ab", pairs = [[1, 2], [1]], extra = {a = "1"}, where = 3')
    problems = load.problems(text)
    below = "loss.weighting."
    assert {path.removeprefix(below): problem.expected for path, problem in problems.items()} == {
        "mode": 'one of "fast", "slow"',
        "either": "a whole number or text in quotes or a list of whole numbers",
        "scales": "a list of numbers",
        "pairs[0][1]": "text in quotes",
        "pairs[1]": "a list of a whole number, text in quotes",
        "extra.a": "a whole number",
        "where": "a path in quotes",
    }
    assert problems[below + "mode"].fix == "write 'fast'"
    assert load.problems(weighting("low = 5, high = 2"))["loss.weighting"].found == "high must be above low"


def test_a_check_that_fails_is_told_with_its_place(load: Loader, toy: Any) -> None:
    module = toy.add(
        "fake-checked",
        """
        from attrs import field, frozen

        @frozen(kw_only=True)
        class CheckedOptions:
            size: int = field(default=1)

            @size.validator
            def _(self, attribute, value):
                {}[value]

        @hookimpl
        def deepspec_weightings():
            return [ComponentSpec(name="checked", summary="", build="a:b", options=CheckedOptions)]
        """,
    )
    load.plugins = load_plugins()
    problem = load.problems(GOOD, "loss.weighting={type='checked', size=3}")["loss.weighting.size"]
    assert problem.problem == "a check of this key failed"
    assert "KeyError: 3" in str(problem.found)
    assert f"{module}.py" in str(problem.found)
