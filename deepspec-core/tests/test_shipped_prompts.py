"""Prompts that a plugin ships are not trusted: its code may fail, give odd values, or hold out what it trains on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from plugin_on_path import install

from deepspec_core.config.schema import SourceOptions
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.shipped_prompts import rows_digest
from deepspec_core.data.source_rows import columns_of
from deepspec_core.data.sources import read_sources
from deepspec_core.errors import DataError, PluginError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry

Prompts = Callable[..., Any]
OFFERS = """
    from deepspec_core.plugins import BuiltinSpec, hookimpl

    NOW = None

    @hookimpl
    def deepspec_builtins():
        return [BuiltinSpec(name="odd", summary="", build="fake_prompts:now", kind="prompts")]

    def now(split, seed):
        return NOW(split, seed)
"""


@pytest.fixture
def shipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Prompts], Registry]:
    """shipping(prompts): a registry in which the package `fake-prompts` ships them as builtin:odd."""
    install(tmp_path / "installed", monkeypatch, "fake-prompts", dedent(OFFERS))

    def ship(prompts: Prompts) -> Registry:
        registry = load_plugins().registry
        monkeypatch.setattr("fake_prompts.NOW", prompts)
        return registry

    return ship


def _row(number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"x{number}", "messages": [{"role": "user", "content": f"Question {number}?"}], **more}


def _train(registry: Registry, tmp_path: Path) -> list[Conversation]:
    return list(
        read_sources(
            [SourceOptions(path="builtin:odd")],
            split="train",
            held_out=0.1,
            seed=3,
            base=tmp_path,
            registry=registry,
            bad_rows=BadRows(most=0.5),
        )
    )


def _digest(registry: Registry, limit: int | None = None) -> str:
    source = SourceOptions(path="builtin:odd", limit=limit)
    columns = columns_of(source).read
    return rows_digest(source.path, seed=3, limit=source.limit, registry=registry, columns=columns)


def _raising(split: str, seed: int) -> Iterator[Any]:
    yield _row(1 if split == "train" else 2)
    raise KeyError("of the odd one")


@pytest.mark.parametrize("prompts", [_raising, lambda split, seed: None, lambda split: []])
def test_code_that_fails_is_told_as_the_plugins(
    shipping: Callable[[Prompts], Registry], tmp_path: Path, prompts: Prompts
) -> None:
    registry = shipping(prompts)
    with pytest.raises(PluginError, match=r"fake-prompts 1\.0 failed"):
        _train(registry, tmp_path)


@pytest.mark.parametrize(
    "odd",
    [
        {"messages": np.array([{"role": "user", "content": "?"}], dtype=object)},
        {"tools": [{"type": "function", "function": {"name": "f", 2: 3}}]},
        {"id": np.int64(3)},
    ],
)
def test_a_row_with_what_json_does_not_have_is_a_bad_row(
    shipping: Callable[[Prompts], Registry], tmp_path: Path, odd: dict[str, Any]
) -> None:
    def prompts(split: str, seed: int) -> list[Any]:
        first = 0 if split == "train" else 100
        return [_row(first, **odd), *(_row(first + i, unread=object()) for i in range(1, 4))]

    registry = shipping(prompts)
    assert [each.id for each in _train(registry, tmp_path)] == ["x1", "x2", "x3"]
    assert _digest(registry) == _digest(registry)


def test_a_question_in_both_splits_is_refused(shipping: Callable[[Prompts], Registry], tmp_path: Path) -> None:
    def prompts(split: str, seed: int) -> list[Any]:
        said = {"role": "user", "content": " question  5? "}
        return [_row(i) for i in range(10)] if split == "train" else [_row(20), {"messages": [said]}]

    registry = shipping(prompts)
    with pytest.raises(DataError, match="a question that it holds out") as error:
        _train(registry, tmp_path)
    assert "x5" in str(error.value)


def test_the_digest_is_of_the_rows_that_are_read(shipping: Callable[[Prompts], Registry]) -> None:
    def prompts(train: int, held_out: int = 0) -> Prompts:
        rows = [_row(number) for number in range(6)]

        def give(split: str, seed: int) -> list[Any]:
            changed = train if split == "train" else held_out
            return [*rows, _row(changed + 100), _row(7)]

        return give

    first = _digest(shipping(prompts(1)))
    assert _digest(shipping(prompts(1))) == first
    assert _digest(shipping(prompts(2))) != first
    assert _digest(shipping(prompts(1, held_out=5))) != first
    assert _digest(shipping(prompts(1)), limit=3) == _digest(shipping(prompts(2)), limit=3)
