"""A small language model as a draft: which vocabularies go together, and how its cache follows what is committed."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.untrained import LanguageModel, Surroundings, UntrainedDraft
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.errors import CheckpointError
from deepspec_core.testing import UntrainedDraftSuite
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_targets import plugin as targets_plugin
from deepspec_targets.small_lm.draft import SmallLM
from deepspec_targets.small_lm.options import SmallLMOptions
from deepspec_targets.small_lm.proposer import SmallLMProposer
from deepspec_targets.small_lm.vocabulary import differences

WIDTH, LIMIT = 4, 21
OPTIONS = {"model": "small", "max_tokens": WIDTH}
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)


@cache
def target(vocab_size: int = 40, max_positions: int = 256, seed: int = 0) -> TinyTarget:
    return TinyTarget(vocab_size=vocab_size, max_positions=max_positions, seed=seed, sharpness=3.0, stop_token_ids=())


def model(vocab_size: int = 40, max_positions: int = 256, seed: int = 0) -> TinyTarget:
    """A model of its own, with a cache of its own."""
    return target.__wrapped__(vocab_size, max_positions, seed)


def near() -> TinyTarget:
    """The target with a head that is not quite its own: some of its tokens are accepted, some are not."""
    made = model()
    head = made.head_weight()
    head += 0.8 * torch.randn(head.shape, generator=torch.Generator().manual_seed(3))
    return made


def requests(count: int = 7) -> list[Request]:
    return [
        Request(id=str(i), prompt_ids=tuple(3 + (5 * i + 3 * j) % 30 for j in range(2 + 3 * i)), seed=i)
        for i in range(count)
    ]


def decoded(
    proposer: Any, sampling: Sampling, *, batch_size: int = 3, asked: Sequence[Request] | None = None, of: Any = None
) -> dict[str, Completion]:
    found = decode(
        of or target(), proposer, requests() if asked is None else asked, sampling=sampling, stop_ids=(),
        max_new_tokens=LIMIT, batch_size=batch_size, max_length=128,
    )  # fmt: skip
    return {completion.id: completion for completion in found}


def outputs(found: dict[str, Completion]) -> dict[str, tuple[int, ...]]:
    return {name: done.output_ids for name, done in found.items()}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(temperature=0.7, top_k=5, top_p=0.9)], ids=str)
def test_the_target_as_its_own_draft_has_every_token_accepted(sampling: Sampling) -> None:
    found = decoded(SmallLMProposer(model(), max_tokens=WIDTH, vocab_size=40), sampling)
    rounds = [each for done in found.values() for each in done.rounds]
    assert {(each.proposal_length, each.acceptance_length) for each in rounds} == {(WIDTH, WIDTH + 1)}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_another_model_is_rejected_now_and_then_and_its_cache_follows(sampling: Sampling) -> None:
    """The proposer against a model that reads the whole text anew for every token."""
    watched = _Watched()
    decoded(watched, sampling)
    assert watched.compared > 40
    assert set(range(WIDTH + 1)) == watched.accepted, "or going back was not tested"


class _Watched(SmallLMProposer):
    """Compares each proposal's distributions with those of a forward pass over the whole text."""

    def __init__(self) -> None:
        super().__init__(near(), max_tokens=WIDTH, vocab_size=40)
        self.texts: dict[int, list[int]] = {}
        self.fresh, self.compared, self.accepted = near(), 0, set[int]()

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        super().start(slots, prompt_ids, lengths, first_token, features)
        for row, slot in enumerate(slots.tolist()):
            self.texts[slot] = [*prompt_ids[row, : lengths[row]].tolist(), int(first_token[row])]

    def propose(self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Any) -> Proposal:
        found = super().propose(slots, limits, sampling, uniforms, stop_ids)
        for row, slot in enumerate(slots.tolist()):
            text = self.texts[slot] + found.tokens[row].tolist()
            ids = torch.tensor([text])
            last = self.fresh.features(ids, torch.ones_like(ids), None, None, ()).last_hidden[0]
            logits = (last @ self.fresh.head_weight().T)[-WIDTH - 1 : -1]
            # Other products, rounded otherwise, and logits of about 10; a cache that is off by one differs by far more.
            if found.probabilities is None:
                chosen = logits.gather(1, found.tokens[row][:, None])[:, 0]
                torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=1e-3)
            else:
                torch.testing.assert_close(found.probabilities[row], logits.softmax(-1), rtol=0, atol=1e-3)
            self.compared += 1
        return found

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        super().accept(slots, committed_ids, committed, features)
        for slot, ids, count in zip(slots.tolist(), committed_ids.tolist(), committed.tolist(), strict=True):
            self.texts[slot] += ids[:count]
            self.accepted.add(count - 1)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_batched_is_as_alone(sampling: Sampling) -> None:
    def of(batch_size: int) -> dict[str, tuple[int, ...]]:
        draft = SmallLMProposer(near(), max_tokens=WIDTH, vocab_size=40)
        return outputs(decoded(draft, sampling, batch_size=batch_size))

    alone = of(1)
    assert of(3) == alone
    if sampling == GREEDY:
        assert alone == outputs(decoded(None, sampling))


@pytest.mark.parametrize("positions", [1, 6, 12, 17])
def test_past_its_own_positions_it_proposes_nothing(positions: int) -> None:
    draft = SmallLMProposer(model(max_positions=positions), max_tokens=WIDTH, vocab_size=40)
    found = decoded(draft, GREEDY)
    assert outputs(found) == outputs(decoded(None, GREEDY))
    for done in found.values():
        at = len(done.prompt_ids)  # the position of the last committed token
        for each in done.rounds:
            assert each.proposal_length == max(0, min(WIDTH, positions - at))
            at += each.acceptance_length


@pytest.mark.parametrize("own", [36, 64])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=str)
def test_vocabularies_of_other_sizes(own: int, sampling: Sampling) -> None:
    """Ids that the draft does not know are in the text; those that the target does not know are never proposed."""
    asked = [evolve(one, prompt_ids=(*one.prompt_ids, 39)) for one in requests()]
    draft = SmallLMProposer(model(vocab_size=own, seed=2), max_tokens=WIDTH, vocab_size=40)
    found = decoded(draft, sampling, asked=asked)  # the engine checks tokens and probabilities
    assert any(token >= 36 for done in found.values() for token in done.output_ids)
    if sampling == GREEDY:
        assert outputs(found) == outputs(decoded(None, sampling, asked=asked))


@frozen
class _Tokenizer:
    vocabulary: dict[str, int]

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


@frozen(kw_only=True)
class _Model:
    """A language model in memory."""

    tokenizer: Any
    loaded: TinyTarget
    name: str = "small"

    @property
    def architecture(self) -> Any:
        return self.loaded.architecture

    def digest(self) -> str:
        return "d"

    def load(self) -> TinyTarget:
        return self.loaded

    def parameters(self) -> int:
        return 7


def build(mine: dict[str, int], targets: dict[str, int], **sizes: int) -> SmallLM:
    small = _Model(tokenizer=_Tokenizer(mine), loaded=model(**sizes))
    assert isinstance(small, LanguageModel)
    around = Surroundings(
        architecture=target().architecture,
        tokenizer=_Tokenizer(targets),
        dtype=torch.float32,
        device=torch.device("cpu"),
        open_model=lambda name, revision: small,
    )
    return SmallLM(SmallLMOptions(model="small", max_tokens=2), around)


VOCABULARY = {"a": 0, "b": 1, "c": 2}


def test_padded_to_another_size_it_is_one_vocabulary() -> None:
    draft = build(dict(reversed(VOCABULARY.items())), VOCABULARY, vocab_size=64)
    assert isinstance(draft, UntrainedDraft)
    assert draft.describe().max_tokens == draft.proposer().max_tokens == 2
    assert draft.proposer() is draft.proposer()
    assert draft.describe().remarks == ()


def test_fewer_positions_than_the_target_are_said() -> None:
    (remark,) = build(VOCABULARY, VOCABULARY, max_positions=16).describe().remarks
    assert "16 positions" in remark
    assert "256" in remark


@pytest.mark.parametrize(
    ("mine", "parts"),
    [
        ({"a": 0, "b": 2, "c": 1}, ["2 with another id", "'b' is 2, 1", "'c' is 1, 2"]),
        ({**VOCABULARY, "d": 3}, ["1 only in the draft's: 'd'"]),
        ({"a": 0}, ["2 only in the target's: 'b', 'c'"]),
        ({"x": 0, "y": 1, "z": 2, "w": 3}, ["4 only in the draft's: 'x', 'y', 'z' ...", "3 only in the target's"]),
    ],
)
def test_another_tokenizer_is_refused_with_what_differs(mine: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(CheckpointError, match="the draft's tokenizer is not the target's") as refused:
        build(mine, VOCABULARY)
    for part in parts:
        assert part in str(refused.value)


def test_equal_maps_do_not_differ() -> None:
    assert differences(VOCABULARY, dict(VOCABULARY)) is None


class TestSmallLM(UntrainedDraftSuite):
    """With a model of 64 tokens, each time from the same weights, and the target's own tokenizer."""

    component = "small-lm"
    plugin = targets_plugin
    options = OPTIONS

    def surroundings(self) -> Surroundings:
        around = super().surroundings()
        small = _Model(tokenizer=around.tokenizer, loaded=model(vocab_size=64, seed=2))
        return evolve(around, open_model=lambda name, revision: small)
