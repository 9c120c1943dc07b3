"""The options of prompt lookup. Imports nothing heavy."""

from __future__ import annotations

from attrs import field, frozen

from deepspec_core.config.bounds import whole


@frozen(kw_only=True)
class LookupOptions:
    """Proposes what followed the last tokens where they stood before, in the prompt or in the answer.

    max_tokens: Tokens of one proposal at most.
    longest: The number of last tokens that are looked up first. While they stand nowhere, one less is looked up.
    shortest: The fewest tokens that are looked up; with none of them found, nothing is proposed.
    """

    max_tokens: int = field(default=7, validator=whole(1, 1024))
    longest: int = field(default=3, validator=whole(1, 64))
    shortest: int = field(default=1, validator=whole(1, 64))

    def __attrs_post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ValueError(f"'shortest' must be at most 'longest', {self.longest}: {self.shortest}")
