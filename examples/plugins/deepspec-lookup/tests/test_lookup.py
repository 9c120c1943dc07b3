"""What prompt lookup proposes, and that it keeps its contract. Uses public names of core only."""

from collections.abc import Sequence
from pathlib import Path

import deepspec_lookup.plugin
import pytest
import torch
from deepspec_lookup.draft import LookupProposer, Text
from deepspec_lookup.options import LookupOptions

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.testing import UntrainedDraftSuite
from deepspec_core.testing.public_imports import check_public_imports


def continued(tokens: Sequence[int], count: int = 3, *, longest: int = 3, shortest: int = 1) -> list[int]:
    text = Text(LookupOptions(longest=longest, shortest=shortest))
    text.extend(tokens)
    return text.continued(count)


def test_what_followed_the_same_tokens_is_proposed() -> None:
    assert continued([5, 6, 7, 8, 9, 5, 6]) == [7, 8, 9]
    assert continued([5, 6, 7, 8, 9, 5, 6], 1) == [7]
    assert continued([5, 6, 7]) == []


def test_more_tokens_in_common_come_first_then_the_latest_place() -> None:
    assert continued([1, 2, 3, 4, 9, 3, 5, 1, 2, 3], 1) == [4], "three tokens before one"
    assert continued([1, 2, 3, 4, 9, 3, 5, 1, 2, 3], 1, longest=1) == [5], "the later of two"


def test_fewer_tokens_than_the_shortest_are_not_looked_up() -> None:
    assert continued([1, 2, 9, 2], shortest=1) == [9, 2, 9]
    assert continued([1, 2, 9, 2], shortest=2) == []


def test_a_text_that_repeats_itself_goes_on_so() -> None:
    assert continued([4, 4, 4], 5) == [4, 4, 4, 4, 4]
    assert continued([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_in_pieces_it_is_the_same_text() -> None:
    whole, pieces = Text(LookupOptions()), Text(LookupOptions())
    tokens = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    whole.extend(tokens)
    for start in range(0, 200, 7):
        pieces.extend(tokens[start : start + 7])
        seen = tokens[: start + 7]
        expected = _searched(seen)
        assert pieces.continued(4) == expected
    assert whole.continued(4) == pieces.continued(4)


def _searched(tokens: list[int], count: int = 4) -> list[int]:
    """By looking at every place, from the end."""
    for size in (3, 2, 1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                following = list(tokens)
                for index in range(count):
                    following.append(following[start + size + index])
                return following[len(tokens) :]
    return []


def started(proposer: Proposer) -> None:
    """Slots 1 and 3 of four: [5 6 7 8 5] and then 6; [9 8] and then 7."""
    proposer.open_slots(4, 64)
    prompts = torch.tensor([[5, 6, 7, 8, 5], [9, 8, 0, 0, 0]])
    proposer.start(torch.tensor([1, 3]), prompts, torch.tensor([5, 2]), torch.tensor([6, 7]), torch.zeros(2, 5, 0))


def propose(proposer: Proposer, slots: Sequence[int], limit: int = 9) -> Proposal:
    chosen = torch.tensor(slots)
    limits = torch.full_like(chosen, limit)
    return proposer.propose(chosen, limits, Sampling(temperature=1.0), torch.zeros(len(slots), 3), ())


def test_slots_are_apart_and_read_what_is_committed() -> None:
    proposer = LookupProposer(LookupOptions(max_tokens=3))
    started(proposer)
    first = propose(proposer, [1, 3])
    assert first.lengths.tolist() == [3, 0]
    assert first.tokens[0].tolist() == [7, 8, 5]
    assert first.probabilities is None, "tokens are chosen, not drawn"
    assert propose(proposer, [3]).tokens.shape == (1, 0)
    assert propose(proposer, [1], limit=2).tokens.tolist() == [[7, 8]]
    committed = torch.tensor([[7, 1, 0, 0], [8, 9, 8, 0]])
    proposer.accept(torch.tensor([1, 3]), committed, torch.tensor([2, 3]), torch.zeros(2, 4, 0))
    second = propose(proposer, [1, 3])
    assert second.lengths.tolist() == [0, 3]
    assert second.tokens[1].tolist() == [7, 8, 9]
    proposer.free(torch.tensor([3]))
    assert propose(proposer, [1]).lengths.tolist() == [0]


class TestLookup(UntrainedDraftSuite):
    component = "lookup"
    plugin = deepspec_lookup.plugin


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="'shortest' must be at most 'longest'"):
        LookupOptions(longest=2, shortest=3)


def test_only_public_names_are_imported() -> None:
    check_public_imports(Path(__file__).parents[1])
