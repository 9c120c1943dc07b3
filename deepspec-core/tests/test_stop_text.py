"""Stop strings: found across the borders of tokens, cut where a served text is cut, held back while they may begin."""

from collections.abc import Sequence

import pytest

from deepspec_core.decoding.stop_text import Shown, StopText, cut

PIECES = ("a", "b", "ab", "END", "E", "ND", "\N{REPLACEMENT CHARACTER}", "")


def text_of(ids: Sequence[int]) -> str:
    return "".join(PIECES[one] for one in ids)


def completes_at(stops: tuple[str, ...], ids: Sequence[int]) -> int | None:
    watch = StopText(stops, text_of).watch()
    return next((index for index, one in enumerate(ids) if watch.push(one)), None)


@pytest.mark.parametrize(
    ("stops", "ids", "index"),
    [
        (("END",), [0, 3, 0], 1),
        (("END",), [0, 4, 5, 0], 2),  # E, ND
        (("aEN",), [2, 0, 4, 5], 3),  # ab, a, E, ND: in the middle of a token
        (("bb", "aa"), [0, 1, 0, 2, 2], 3),  # a, b, a, ab
        (("aab",), [0, 0, 0, 1], 3),  # a beginning that begins again
        (("END",), [4, 7, 5], 2),  # a token without text between
        (("END",), [4, 0, 5], None),
        ((), [3, 3], None),
    ],
)
def test_the_token_that_completes_a_string_is_found(stops: tuple[str, ...], ids: list[int], index: int | None) -> None:
    assert completes_at(stops, ids) == index


def test_a_character_that_is_not_complete_is_no_text_yet() -> None:
    text = {(0,): "x\N{REPLACEMENT CHARACTER}", (0, 1): "x\N{EURO SIGN}"}
    watch = StopText(("x",), lambda ids: text.get(tuple(ids), "")).watch()
    assert not watch.push(0)
    assert watch.push(1)


def test_the_text_ends_before_the_first_string() -> None:
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ("two",)) == "one"
    assert StopText(("e t",), text_of).cut("one two") == "on"


@pytest.mark.parametrize("stops", [("END",), ("aab", "b"), ("aa", "aab")])
def test_what_is_shown_is_the_cut_text_and_never_part_of_a_string(stops: tuple[str, ...]) -> None:
    for ids in ([0, 0, 0, 1, 2], [4, 5, 0], [4, 0, 4, 0], [0, 4], [1, 1], [4]):
        shown, parts = Shown(stops), []
        for one in ids:
            parts.append(shown.push(PIECES[one]))
            so_far = "".join(parts)
            assert cut(text_of(ids), stops).startswith(so_far)
        assert "".join(parts) + shown.rest() == cut(text_of(ids), stops)
