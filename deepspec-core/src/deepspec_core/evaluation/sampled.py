"""How an evaluation, or `generate`, samples and ends its answers: turns options into the objects that decoding takes.

This file knows options by their names. It does not know where they come from, or what is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from deepspec_core.config.schema import EvaluateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.stop_text import StopText

_TOLD = ("top_p", "top_k", "min_p", "repetition_penalty", "stop", "samples")


class Sampled(Protocol):
    """The options that decide how tokens are drawn and where answers end."""

    @property
    def top_p(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def min_p(self) -> float: ...

    @property
    def repetition_penalty(self) -> float: ...

    @property
    def stop(self) -> tuple[str, ...]: ...


def sampling_at(options: Sampled, temperature: float) -> Sampling:
    """How tokens are drawn at a temperature."""
    return Sampling(
        temperature=temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )


def stop_text(options: Sampled, tokenizer: Any) -> StopText | None:
    """The stop texts that end answers beside stop tokens; None if there are none. `tokenizer` is a Hub tokenizer."""
    return StopText(options.stop, shown_text(tokenizer)) if options.stop else None


def shown_text(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """The text of ids as servers give it: without special tokens, and with all spaces."""

    def decode(ids: Sequence[int]) -> str:
        # Cleaning up would remove spaces that were already shown in an earlier part of the text.
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def told(options: EvaluateOptions) -> dict[str, Any]:
    """The settings of a report that are not at their defaults, in plain JSON types."""
    return {name: value for name, value in _values(options).items() if value != _USUAL[name]}


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a report, with the defaults of those that the report does not have."""
    return {**_USUAL, **settings}


def _values(options: EvaluateOptions) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in _TOLD}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


_USUAL: Final = _values(EvaluateOptions())
