"""What the tests of this package share: small drafts of every algorithm, with what exporters are told of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, field, fields, frozen
from random_targets import SIZES, SMALL, TAPS
from transformers import AutoConfig

from deepspec_core.checkpoints.export_facts import facts_of
from deepspec_core.checkpoints.exports import Format
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts, TargetName
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.families.styled import styled_adapter
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.random_batches import with_large_weights


@frozen(kw_only=True)
class Drafted:
    """A draft, the adapter it was made with, and its facts."""

    draft: DraftModel
    adapter: TargetAdapter
    facts: ExportFacts
    registry: Registry = field(repr=False)

    def format(self, name: str) -> Format:
        """An installed format of the draft's algorithm."""
        return Format.of(name, self.facts.description.algorithm, self.registry)

    def unservable(self, name: str) -> str | None:
        """What the format has against the draft."""
        return self.format(name).exporter.unservable(self.facts)

    def export(self, name: str, out: Path) -> Path:
        """The draft in a format, in a folder named after it."""
        self.format(name).check(self.facts, where="a test")
        self.format(name).write(self.draft, self.facts, out / name)
        return out / name


@pytest.fixture
def drafted(registry: Registry) -> Callable[..., Drafted]:
    """drafted(algorithm, family, taps, layer, target, markov, **options): a draft whose outputs differ clearly."""

    def make(
        algorithm: str,
        family: str = "qwen3",
        *,
        taps: tuple[int, ...] = TAPS,
        layer: dict[str, Any] | None = None,
        target: TargetName | None = TargetName(name="org/target"),  # noqa: B008 - frozen
        markov: dict[str, Any] | None = None,
        **options: Any,
    ) -> Drafted:
        model_type = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}.get(family, family)
        config = AutoConfig.for_model(model_type, **SIZES)
        given = LayerOptions(**{"intermediate_size": 40, **(layer or {})})
        adapter: TargetAdapter = registry.load("target", family)(config, evolve(given, style=None))
        if given.style is not None:
            adapter = styled_adapter(adapter, config, given, None, registry=registry)
        spec = registry.get("draft", algorithm)
        assert spec.options is not None
        known = {one.name: one for one in fields(spec.options)}
        chosen = {name: value for name, value in (SMALL | options).items() if name in known}
        made = spec.options(**chosen)
        if markov is not None:
            made = evolve(made, markov=evolve(made.markov, **markov))
        torch.manual_seed(0)
        draft = with_large_weights(registry.load("draft", algorithm)(made, adapter, taps)).eval()
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                if "norm" in name:
                    parameter.normal_(mean=1.0, std=0.3)
        facts = facts_of(draft, adapter, target=target)
        return Drafted(draft=draft, adapter=adapter, facts=facts, registry=registry)

    return make
