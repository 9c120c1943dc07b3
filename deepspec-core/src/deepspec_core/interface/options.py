"""Options of the Python interface, checked as strictly as those of a run file: all problems are reported at once.

Knows how keyword arguments become an attrs class. config/ knows the values that the keys of a run file may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from attrs import field, frozen
from attrs.validators import deep_iterable

from deepspec_core.config.bounds import above, real, whole
from deepspec_core.config.explain import explain
from deepspec_core.config.load import as_toml
from deepspec_core.config.sampling_bounds import stop_string, temperatures
from deepspec_core.config.structure import strict_converter
from deepspec_core.errors import ConfigError
from deepspec_core.plugins.registry import Registry

Options = TypeVar("Options")


@frozen(kw_only=True)
class GenerateOptions:
    """The options of `generate`. `thinking` and `system_prompt` apply to prompts that go through the chat template."""

    max_new_tokens: int = field(default=256, validator=whole(1))
    temperature: float = field(default=0.0, validator=temperatures)
    top_p: float = field(default=1.0, validator=above(0.0, 1.0))
    top_k: int = field(default=0, validator=whole(0))
    min_p: float = field(default=0.0, validator=real(0.0, 1.0))
    repetition_penalty: float = field(default=1.0, validator=real(0.01, 100.0))
    stop: tuple[str, ...] = field(default=(), validator=deep_iterable(stop_string))
    thinking: bool = False
    system_prompt: str | None = None
    seed: int = field(default=0, validator=whole(0, 2**63 - 1))
    batch_size: int = field(default=1, validator=whole(1, 2**20))
    confidence_threshold: float = field(default=0.0, validator=real(0.0, 1.0))


def checked(kind: type[Options], values: Mapping[str, Any], *, call: str, registry: Registry) -> Options:
    """The values as an options object. Numbers from NumPy and PyTorch count as Python numbers.

    ConfigError holds every problem, and names the arguments of the function `call`.
    """
    try:
        return strict_converter(registry).structure(as_toml(values), kind)
    except Exception as error:
        problems = explain(error, "", siblings={})
    for problem in problems:
        problem.where = str(problem.where).removeprefix(".")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError(f"{count} in the arguments of {call}", problems=problems)
