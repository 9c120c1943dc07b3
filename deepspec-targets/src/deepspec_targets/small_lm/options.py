"""The options of a small language model as a draft. Imports nothing heavy."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import instance_of

from deepspec_core.config.bounds import whole


@frozen(kw_only=True)
class SmallLMOptions:
    """A causal language model with the target's tokenizer proposes the tokens, with one forward pass per token.

    model: A Hub id, a directory, or builtin:NAME.
    revision: A branch, tag or commit of the Hub repository.
    max_tokens: The number of tokens of one proposal.
    """

    model: str = field(validator=instance_of(str))
    revision: str | None = None
    max_tokens: int = field(default=4, validator=whole(1, 256))
