"""The request that every server gets, whatever its dialect. Knows values; knows no servers."""

from __future__ import annotations

from attrs import field, frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer


@frozen(kw_only=True)
class Names:
    """How messages call what the user set: keys of a run file, or options of a command."""

    servers: str = "regenerate.servers"
    served_as: str = "regenerate.served_as"
    key: str = "regenerate.api_key_env"
    length: str = "data.max_length"
    timeout: str = "regenerate.timeout"


@frozen(kw_only=True)
class Wanted:
    """The target, how its tokens are drawn, and how long answers may be.

    names: The names that servers may know the target by, the likeliest first.
    end_id: The stop token that ends an answer where a server tells only that it ended.
    max_tokens: Tokens of an answer at most. max_length: tokens of an answer and its prompt.
    key: The servers' key. timeout: seconds for one answer. max_concurrency: requests that one server has at once.
    called: How messages call the settings.
    """

    names: tuple[str, ...]
    tokenizer: ChatTokenizer
    vocab_size: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    end_id: int
    max_tokens: int
    max_length: int
    key: str | None = field(default=None, repr=False)
    timeout: float = 1800.0
    max_concurrency: int = 512
    called: Names = Names()

    def limit(self, prompt_ids: tuple[int, ...]) -> int:
        """New tokens that the answer to this prompt may have."""
        return min(self.max_tokens, self.max_length - len(prompt_ids))
