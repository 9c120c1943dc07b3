"""From rows, texts with spans or tokens that came with a row, to samples: many texts in one call of the tokenizer.

Spans become masks by the bytes of tokens (token_bytes.py) where these tell, else by the tokenizer's own offsets. Knows
tokenizers and spans; neither templates nor conversations.

Legend: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from attrs import define, frozen
from transformers import PreTrainedTokenizerFast

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.answers import Answer, supervised
from deepspec_core.data.token_bytes import TokenBytes, token_bytes, trims_offsets

Array = np.ndarray[Any, Any]
# The tokenizer's result is a hundred times as large as its text, so few long texts are encoded at once.
_CHARACTERS_AT_ONCE: Final = 1 << 18


@frozen(kw_only=True)
class TextRow:
    """A text and its supervised spans."""

    text: str
    spans: list[Answer]


@frozen(kw_only=True)
class TokenRow:
    """Token ids and loss mask [T], 1 = supervised, as they came with a conversation."""

    ids: Sequence[int]
    mask: Sequence[int]

    def arrays(self, most: int) -> tuple[Array, Array]:
        """The first `most` of them, int64 and bool."""
        return np.array(self.ids[:most], dtype=np.int64), np.array(self.mask[:most], dtype=np.bool_)


@frozen(kw_only=True)
class Row:
    """The content of one sample, and its id."""

    id: str
    content: TextRow | TokenRow


@define(slots=False, kw_only=True)
class Encoding:
    """A transformers fast tokenizer, called for rendered texts: nothing is added to them."""

    tokenizer: Any

    def with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the characters each stands for, without white space that an added token swallows."""
        if not self._has_own_ways:
            # The wrapper around the Rust tokenizer takes a third of the time, and does nothing for a single text.
            read = self._undisturbed().encode(text, add_special_tokens=False)
            ids, offsets = read.ids, read.offsets
        else:
            # verbose: samples are cut at the target's positions, so the library's warning of long ones means nothing.
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        if self.swallowing:
            offsets = [self._own(text, *each) for each in zip(ids, offsets, strict=True)]
        return ids, offsets

    def masked(self, rows: Sequence[TextRow], most: int) -> Iterator[tuple[Array, Array]]:
        """The first `most` token ids [T] int64 of each text, and which of them are supervised, [T] bool."""
        known = self.bytes
        if known is None:
            yield from (self._masked_by_offsets(row, most) for row in rows)
            return
        for some in _at_once(rows):
            read = self._undisturbed().encode_batch_fast([row.text for row in some], add_special_tokens=False)
            ids, texts, spans = [one.ids for one in read], [row.text for row in some], [row.spans for row in some]
            masks = known.masks(texts, ids, spans, most)
            if masks is not None:
                yield from masks
                continue
            for row, each in zip(some, ids, strict=True):
                own = known.masks([row.text], [each], [row.spans], most)
                yield self._masked_by_offsets(row, most) if own is None else own[0]

    def joins_start(self, row: TextRow) -> bool:
        """Whether an answer's first characters share a token with the text before it, so that they are not supervised.

        Tokenizers join white space: a newline that begins an answer goes to the newline that ends the header.
        """
        starts = [span.start for span in row.spans if 0 < span.start < span.text_end and row.text[span.start].isspace()]
        if not starts:
            return False
        _, offsets = self.with_offsets(row.text)
        return any(begin < start < end for start in starts for begin, end in offsets)

    @cached_property
    def bytes(self) -> TokenBytes | None:
        """The bytes of tokens; None where they tell nothing of a text."""
        return None if self._has_own_ways else token_bytes(self.tokenizer)

    @cached_property
    def swallowing(self) -> dict[int, str]:
        """The added tokens that take the white space beside them, by id: an answer's end marker may be one."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {index: token.content for index, token in added if token.lstrip or token.rstrip}

    @cached_property
    def counts_spaces(self) -> bool:
        """Whether tokens of nothing but spaces are supervised against the tokenizer's own offsets."""
        return trims_offsets(self.tokenizer.backend_tokenizer)

    def _own(self, text: str, index: int, offset: tuple[int, int]) -> tuple[int, int]:
        content = self.swallowing.get(index)
        at = -1 if content is None else text.find(content, *offset)
        return offset if content is None or at < 0 else (at, at + len(content))

    def _masked_by_offsets(self, row: TextRow, most: int) -> tuple[Array, Array]:
        ids, offsets = self.with_offsets(row.text)
        mask = supervised(offsets[:most], row.spans)
        return np.array(ids[:most], dtype=np.int64), np.array(mask, dtype=np.bool_)

    @cached_property
    def _has_own_ways(self) -> bool:
        return any(
            getattr(type(self.tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None)
            for name in ("__call__", "_encode_plus")
        )

    def _undisturbed(self) -> Any:
        """The Rust tokenizer, as every call of transformers sets it: an earlier call may have left it otherwise."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.tokenizer.split_special_tokens:
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend


def cut(identity: str, ids_T: Array, mask_T: Array) -> Sample:
    """The sample, which ends one token after its last supervised one."""
    last = len(mask_T) - 1 - int(mask_T[::-1].argmax()) if mask_T.any() else -1
    keep = min(last + 2, len(ids_T))
    return Sample(
        id=identity,
        input_ids=torch.from_numpy(ids_T[:keep]),
        loss_mask=torch.from_numpy(mask_T[:keep]),
        original_length=len(ids_T),
    )


def _at_once(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    some: list[TextRow] = []
    characters = 0
    for row in rows:
        some.append(row)
        characters += len(row.text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield some
            some, characters = [], 0
    if some:
        yield some
