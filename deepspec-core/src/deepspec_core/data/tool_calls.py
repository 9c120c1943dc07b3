"""Whether an answer calls a tool, told from how the chat template writes calls.

A call is rendered, and what stands before the function's name is its beginning. Where that starts with a token of the
tokenizer's own, such as <tool_call>, the token is enough. Elsewhere (JSON, or code) the name of a tool on offer has to
follow, since answers write JSON for other reasons too. Knows texts of answers; not how a template is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from attrs import frozen

from deepspec_core.errors import DataError

_NAME: Final = "zqfqz"
ASKED: Final = {"role": "user", "content": "?"}
TOOL: Final = {
    "type": "function",
    "function": {"name": _NAME, "description": "!", "parameters": {"type": "object", "properties": {}}},
}
_PLAIN: Final = {"role": "assistant", "content": "!"}
_CALL: Final = {
    "role": "assistant",
    "content": "",
    # Some templates ask for an identity of nine letters and digits.
    "tool_calls": [{"id": "a12345678", "type": "function", "function": {"name": _NAME, "arguments": {"key": "value"}}}],
}


@frozen(kw_only=True)
class CallForm:
    """How calls are written: the text before the function's name, and the character after it.

    marker: The token of the tokenizer's own that a call begins with, None where it begins with plain text.
    """

    before: str
    after: str
    marker: str | None

    def is_in(self, answer: str, names: Iterable[str]) -> bool:
        """Whether the answer calls a tool. `names` are those on offer."""
        if self.marker is not None:
            return self.marker in answer
        said = _squeezed(answer)
        return any(_squeezed(f"{self.before}{name}{self.after}") in said for name in names)


def form_of(text_of: Callable[[Mapping[str, Any]], str], added_tokens: Iterable[str]) -> CallForm | None:
    """`text_of` renders an answer to ASKED, with TOOL on offer. None where the template writes no calls."""
    try:
        text, plain = text_of(_CALL), text_of(_PLAIN)
    except DataError:
        return None
    # What stands before every answer, such as an empty think block, belongs to no call.
    same = next((i for i, (one, other) in enumerate(zip(text, plain, strict=False)) if one != other), 0)
    before, name, after = text[same:].lstrip().partition(_NAME)
    if not name:
        return None
    markers = [token for token in added_tokens if token and before.startswith(token)]
    return CallForm(before=before, after=after[:1], marker=max(markers, key=len, default=None))


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
