"""Overrides on the command line: what they may be, in which order they count, how errors name them."""

from __future__ import annotations

import pytest
from run_file_loading import GOOD, Loader


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.name=words", "run", "name", "words"),
        ("run.name='quoted'", "run", "name", "quoted"),
        ("run.name=2026-01-31", "run", "name", "2026-01-31"),
        ("run.output=runs/x", "run", "output", "runs/x"),
        ("target.model = Owner/Name-4B", "target", "model", "Owner/Name-4B"),
        ("train.lr=3e-4", "train", "lr", 3e-4),
        ("train.max_steps=1_000", "train", "max_steps", 1000),
        ("regenerate.servers=['http://a:1/v1']", "regenerate", "servers", ("http://a:1/v1",)),
        ("data.system_prompt=a=b", "data", "system_prompt", "a=b"),
    ],
)
def test_overrides_are_toml_or_bare_words(load: Loader, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(GOOD, override), section), key) == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.lr", "not an override"),
        ("=3", "not an override"),
        ("train..lr=3", "not an override"),
        ("train.lr=3\nrun.name='x'", "more than one value"),
        ("run.stages=[train]", "not a TOML value"),
        ("run.name='x", "not a TOML value"),
        ("run.name=", "not a TOML value"),
        ("run.name.first=3", "not a table"),
        ("data.sources.path=3", "not a table"),
    ],
)
def test_overrides_that_cannot_be_read(load: Loader, override: str, problem: str) -> None:
    (only,) = load.problems(GOOD, override).values()
    assert (only.problem, only.where) == (problem, f"--set {override}")


def test_overrides_win_in_order_and_are_named_in_errors(load: Loader) -> None:
    assert load(GOOD, "run.seed=1", "run.seed=2").run.seed == 2
    assert load.problems(GOOD, "run.seed=x")["run.seed"].found == '"x" (text), from --set'
