"""A run's training samples: stored once in the run's folder, read by every stage and every worker from there.

Knows which facts of a run decide its tokens. Does not know how they are stored (data/token_store.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

import attrs
import jinja2
import tokenizers
import transformers

from deepspec_core import __version__
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.digest_set import DigestSet, digest16
from deepspec_core.data.split import RULE
from deepspec_core.data.stored_samples import StoredSamples
from deepspec_core.data.token_store import Manifest, TokenStore
from deepspec_core.data.token_workers import in_processes
from deepspec_core.data.tokenizing import Sorting, Tokenisation, in_chunks
from deepspec_core.errors import DataError
from deepspec_core.pipeline import workers
from deepspec_core.progress import Progress

# How long a worker looks at tokens made from something else before it says so.
_PATIENCE_SECONDS: Final = 600.0
# run_data.RunData, which imports this module.
RunData = Any


def stored_samples(data: RunData) -> tuple[StoredSamples, Counter[str]]:
    """The samples, and what was counted when they were made. The first worker stores them, the others wait for it.

    Raises DataError if a conversation, a source or the chat template cannot be used at all.
    """
    store = TokenStore(data.tokens_folder, made_from(data))
    ready = store.ready()
    if ready is None and workers.rank() == 0:
        read = Counter[str]()
        store.fill(partial(_made, data, read), read, partial(_refuse_changes, data, _digests(data)))
        ready = store.ready()
        if ready is None:
            raise DataError(
                "The stored tokens differ from those that were just written",
                where=store.folder,
                fix="Check the disk, and whether another process writes to this folder.",
            )
    since = time.monotonic()
    while ready is None:
        workers.crew().check()
        time.sleep(workers.POLL_SECONDS)
        ready = store.ready()
        # What an earlier run left is of other facts too, until the first worker begins to make it anew.
        if (others := store.of_other_facts()) is None:
            since = time.monotonic()
        elif time.monotonic() - since > _PATIENCE_SECONDS:
            raise DataError(
                f"Worker {workers.rank()} would tokenise differently from the first worker",
                where=store.folder,
                found="other values of: " + ", ".join(others),
                expected="the same sources, tokenizer and versions for every worker",
                fix="Sources of a plugin must give the same rows in the same order in every process.",
            )
    return ready


def made_from(data: RunData) -> dict[str, Any]:
    """All that decides the tokens, by names for people. Where one of these changes, the tokens are made anew."""
    options, tokenizer = data.options, data.target.tokenizer
    fmt = data.target.family.conversation_format()
    facts: dict[str, Any] = {
        "the versions": {
            "deepspec-core": __version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "jinja2": jinja2.__version__,
        },
        "the tokenizer": tokenizer.tokenizer_fingerprint(),
        "special tokens": [str(tokenizer.tokenizer.special_tokens_map), tokenizer.refused_tokens()],
        "the chat template or what of it is supervised": tokenizer.template_fingerprint(
            fmt, options.system_prompt, data.supervision
        ),
        "the target's vocabulary": data.target.architecture.vocab_size,
        "the longest sample": data.max_length,
        "data.min_supervised_tokens": options.min_supervised_tokens,
    }
    if data.regenerated is not None:
        return {**facts, "the regenerated conversations": data.noted_regenerated()}
    content = data.noted_sources()
    return {
        **facts,
        "data.sources": [attrs.asdict(source) for source in options.sources],
        "the content of data.sources": content,
        "the split": [RULE, options.held_out, data.seed],
        "data.duplicates": options.duplicates,
        "data.max_bad_rows": options.max_bad_rows,
    }


def _made(data: RunData, read: Counter[str], manifest: Manifest) -> Iterator[tuple[list[Sample], Counter[str]]]:
    """The samples of each conversation that is not stored yet, with the counts up to there."""
    last = manifest.shards[-1] if manifest.shards else None
    done, seen = (last.conversations if last else 0), DigestSet()
    if last is not None:
        for identity in StoredSamples([data.tokens_folder / shard.file for shard in manifest.shards]).ids():
            seen.add(digest16(identity))
    options = data.options
    tokenisation = Tokenisation(
        tokenizer=data.target.tokenizer,
        fmt=data.target.family.conversation_format(),
        system_prompt=options.system_prompt,
        max_length=data.max_length,
        supervision=data.supervision,
        vocab_size=data.target.architecture.vocab_size,
    )
    sorting = Sorting(
        max_length=data.max_length,
        min_supervised_tokens=options.min_supervised_tokens,
        counts=Counter(last.counts if last else {}),
        seen=seen,
    )
    each = in_chunks if options.workers == 1 else partial(in_processes, processes=options.workers)
    # What is stored is read again, since ids and prompts are told from all before them, and not tokenised again.
    conversations = islice(data.training_conversations(read, keep=True), done, None)
    with Progress(data.expected_conversations(), "tokenise", "conversations", done=done) as progress:
        for conversation, outcome in each(conversations, tokenisation):
            yield sorting.kept(conversation, outcome), sorting.counts
            progress.advance()


def _digests(data: RunData) -> list[str | None]:
    if data.regenerated is not None:
        return [data.regenerated_digest()]
    return [data.source_digest(index, ask_hub=False) for index in range(len(data.options.sources))]


def _refuse_changes(data: RunData, before: list[str | None]) -> None:
    """Raise DataError if a file is not what it was when the first conversation was read."""
    if _digests(data) != before:
        raise DataError(
            "A source changed while it was read",
            where=f"{data.named_in}: data.sources",
            expected="files that nobody writes while a run reads them",
            fix="Run again.",
        )
