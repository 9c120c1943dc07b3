"""How an evaluation, or `generate`, draws and ends its answers: what the options say, as decoding takes it.

Knows options by their names. Does not know where they come from, or what is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from deepspec_core.config.schema import EvaluateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.stop_text import StopText

_TOLD = ("top_p", "top_k", "min_p", "repetition_penalty", "stop", "samples")


class Sampled(Protocol):
    """The options that say how tokens are drawn and where answers end."""

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
    """What ends answers beside stop tokens, with the text that `tokenizer`, a Hub tokenizer, makes of ids."""
    return StopText(options.stop, shown_text(tokenizer)) if options.stop else None


def shown_text(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """The text of ids as servers give it: without special tokens, and with all spaces."""

    def decode(ids: Sequence[int]) -> str:
        # Cleaning up would remove spaces that were told already.
        return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return decode


def told(options: EvaluateOptions) -> dict[str, Any]:
    """The settings of a report that are not at their defaults, in plain JSON types."""
    return {name: value for name, value in _values(options).items() if value != _USUAL[name]}


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a report, also those that are at their defaults."""
    return {**_USUAL, **settings}


def _values(options: EvaluateOptions) -> dict[str, Any]:
    found = {name: getattr(options, name) for name in _TOLD}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


_USUAL: Final = _values(EvaluateOptions())
