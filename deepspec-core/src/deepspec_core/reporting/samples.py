"""Sample answers that show the round of every token: made from an evaluation's rounds, and stored in a file.

This file knows what rounds commit, and uses a function from ids to text. The stored file holds text, so a page needs no
tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from deepspec_core.decoding.engine import Completion
from deepspec_core.decoding.text_stream import TextStream
from deepspec_core.errors import StageError
from deepspec_core.evaluation.sealed_json import read_sealed, write_sealed

NAME: Final = "samples.json"
MOST_TOKENS: Final = 256
_FORM, _VERSION = "deepspec-samples", 1


def sample_of(completion: Completion, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """The prompt's text, and the answer's as pieces, each of one round and one author, in plain JSON types.

    A piece has its `round` (0: the token that the prefill gave), whether the draft proposed it (`drafted`; else the
    target chose it), and its number of `tokens`. `left_out` counts the tokens after the first MOST_TOKENS. A character
    that several tokens form belongs to the last of them.
    """
    stream = TextStream(decode)
    pieces: list[dict[str, Any]] = []
    shown = completion.output_ids[:MOST_TOKENS]
    for token, (number, drafted) in zip(shown, _authors(completion), strict=False):
        last = pieces[-1] if pieces else None
        if last is None or (last["round"], last["drafted"]) != (number, drafted):
            pieces.append(last := {"round": number, "drafted": drafted, "tokens": 0, "text": ""})
        last["tokens"] += 1
        last["text"] += stream.push(token)
    if pieces:
        pieces[-1]["text"] += stream.rest()
    return {
        "id": completion.id,
        "prompt": decode(completion.prompt_ids),
        "pieces": pieces,
        "left_out": len(completion.output_ids) - len(shown),
    }


def write_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write the file. It appears only when all of it is written."""
    write_sealed(path, {"samples": list(samples)}, form=_FORM, version=_VERSION)


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples in the file; empty if missing, as with older evaluations. Raises StageError if it was edited."""
    if not path.exists():
        return []
    fix = "Remove it to have a page without samples, or evaluate again with --force evaluate."
    content = read_sealed(path, form=_FORM, version=_VERSION, what="the file of samples", kind=StageError, fix=fix)
    return list(content["samples"])


def _authors(completion: Completion) -> list[tuple[int, bool]]:
    """The round of each output token, and whether the draft proposed it."""
    authors = [(0, False)]
    for number, one in enumerate(completion.rounds, start=1):
        own = one.acceptance_length - one.accepted_draft_length
        authors += [(number, True)] * one.accepted_draft_length + [(number, False)] * own
    return authors
