"""Chunks of attention: they stay within the scores they may hold, and their keys come in few lengths."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepspec_core.layers.score_chunks import few_lengths, queries_a_chunk


@given(st.integers(1, 1 << 26), st.integers(0, 1 << 28))
def test_a_chunk_is_as_large_as_it_may_be_up_to_a_round_number(most: int, a_query: int) -> None:
    size = queries_a_chunk(most, a_query)
    assert size % 128 == 0 or size & (size - 1) == 0
    assert size == 1 or size * a_query <= most
    assert 2 * size * max(1, a_query) > most


@given(st.integers(1, 1 << 17), st.data())
def test_a_wider_slice_holds_what_is_seen(num_tokens: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_tokens - 1))
    stop = data.draw(st.integers(start, num_tokens))
    wide = few_lengths(slice(start, stop), num_tokens)
    assert 0 <= wide.start <= start
    assert stop <= wide.stop <= num_tokens
    assert wide.stop - stop <= 127 or wide.stop - stop < num_tokens / 32 + 128


def test_the_keys_of_a_long_sequence_come_in_few_lengths() -> None:
    for num_tokens in (100, 5_000, 32_768, 131_072):
        ends = {few_lengths(slice(0, end), num_tokens).stop for end in range(1, num_tokens + 1)}
        assert len(ends) <= 32
        assert max(ends) == num_tokens
