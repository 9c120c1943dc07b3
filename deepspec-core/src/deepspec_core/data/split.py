"""Which conversations are held out from training, and which repeat a prompt, decided by what the users say.

Sources repeat each other's prompts under other ids, with other system prompts and other answers. A split by id could
put a held-out prompt into training; this split cannot. Knows messages; does not know where they come from.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Final, Literal

from deepspec_core.data.conversations import Conversation

Split = Literal["train", "held_out"]

# Part of the fingerprint of what is made from a split. Another rule, another number.
RULE: Final = "first question, 2"


def prompt_digest(conversation: Conversation) -> bytes:
    """16 bytes that depend on the first user's text alone, as compared: Unicode NFKC, case folded, white space as one.

    A conversation in which no user speaks is told by its whole content.
    """
    for message in conversation.messages:
        if message["role"] == "user":
            return hashlib.sha256(_compared(message["content"])).digest()[:16]
    return hashlib.sha256(conversation.digest.encode()).digest()[:16]


def whole_prompt_digest(conversation: Conversation) -> bytes:
    """16 bytes that depend on all that systems and users say, in order, compared as in prompt_digest.

    Answers, tools and their results, and ids do not count. A conversation in which no user speaks is told by its whole
    content.
    """
    said = [(message["role"], message["content"]) for message in conversation.messages]
    if not any(role == "user" for role, _ in said):
        return prompt_digest(conversation)
    digest = hashlib.sha256()
    for role, content in said:
        if role in ("system", "user"):
            text = _compared(content)
            digest.update(f"{role} {len(text)} ".encode() + text)
    return digest.digest()[:16]


def _compared(text: str) -> bytes:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode("utf-8", "surrogatepass")


def is_held_out(prompt: bytes, *, held_out: float, seed: int) -> bool:
    """Whether conversations with this prompt_digest are held out: those of a share `held_out` of all prompts."""
    digest = hashlib.sha256(f"{seed}/".encode() + prompt).digest()
    return int.from_bytes(digest[:8], "big") < held_out * 2**64
