"""The `columns` of a source: which names it may give, and whether they make one conversation.

Knows names. Does not know rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from deepspec_core.errors import ConfigError, nearest

# What a conversation is made from: one of these.
BASES: Final = ("messages", "turns", "prompt")
# What may stand beside it, and beside which of them.
BESIDE: Final = {
    "system": BASES,
    "input": ("prompt",),
    "answer": ("prompt",),
    "role": ("messages",),
    "content": ("messages",),
    "tools": BASES,
    "id": BASES,
}


def column_mistakes(columns: Mapping[str, str], where: str, *, builtin: bool) -> Iterator[ConfigError]:
    """Everything that is wrong with a `columns` map. `where` is its key; a `builtin` source has no use for one."""
    if columns and builtin:
        yield ConfigError(
            "`columns` cannot be used with a builtin source",
            where=where,
            found=", ".join(columns),
            expected="no columns",
            fix="remove columns",
        )
        return
    for name in columns:
        if name not in (*BASES, *BESIDE):
            close = nearest(name, (*BASES, *BESIDE))
            yield ConfigError(
                "this is not a name of a conversation's part",
                where=f"{where}.{name}",
                found=f'{name} = "{columns[name]}"',
                expected=f"one of {', '.join((*BASES, *BESIDE))}; the source's own names are the values",
                fix=f"is `{close}` meant?" if close else None,
            )
    given = [name for name in BASES if name in columns]
    if columns and len(given) != 1:
        yield ConfigError(
            "`columns` must name exactly one of messages, turns and prompt",
            where=where,
            found=" and ".join(given) or "none of them",
            expected=f"one of {', '.join(BASES)}",
        )
        return
    for name, bases in BESIDE.items():
        if name in columns and not set(bases) & set(given):
            yield ConfigError(
                f"`{name}` can be given with {' or '.join(f'`{base}`' for base in bases)} only",
                where=f"{where}.{name}",
                found=f"given with `{given[0]}`",
                expected=f"no `{name}`",
            )
