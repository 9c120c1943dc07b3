"""The options of prompt lookup. Imports nothing heavy."""

from __future__ import annotations

from attrs import field, frozen

from deepspec_core.config.bounds import whole


@frozen(kw_only=True)
class LookupOptions:
    """Proposes the tokens that followed an earlier occurrence of the last tokens, in the prompt or in the answer.

    max_tokens: The largest number of tokens in one proposal.
    longest: The number of last tokens that are looked up first. If they do not occur earlier, one token less is looked
        up, and so on.
    shortest: The smallest number of tokens that are looked up. If these do not occur earlier either, nothing is
        proposed.
    """

    max_tokens: int = field(default=7, validator=whole(1, 1024))
    longest: int = field(default=3, validator=whole(1, 64))
    shortest: int = field(default=1, validator=whole(1, 64))

    def __attrs_post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ValueError(f"'shortest' must be at most 'longest', {self.longest}: {self.shortest}")
