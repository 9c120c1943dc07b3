"""Speculative sampling against probabilities that are summed up exactly, not drawn: every sequence of the first tokens,
at seven settings of sampling, with drafts that know nothing, everything, or the opposite, with trees, with two drafts
that need no training, and with a repetition penalty for every algorithm.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from deepspec_lookup.draft import LookupProposer
from deepspec_lookup.options import LookupOptions
from torch import Tensor

import deepspec_core.decoding.verify as verify_module
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.decoding.sampling import draw
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.table_trees import TreeTableProposer
from deepspec_targets.small_lm.proposer import SmallLMProposer

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB, TOKENS, DRAWS = 7, 3, 3000
PROMPT = (3, 4, 5)
LEAST_EXPECTED = 5  # of each cell of the test; rarer sequences are taken together
# A right sampler fails at one in 30,000 of these, with fixed seeds at none; a wrong one misses by far.
MOST_SIGMAS = 4.0
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(temperature=1.0, top_k=3),
    Sampling(temperature=1.2, top_p=0.8),
    Sampling(temperature=1.0, repetition_penalty=2.5),
    Sampling(temperature=0.9, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=0.6),
]
DRAFTS = ("table", "knows", "contrary", "certain", "lookup", "small-lm", "trees")
_INSTALLED = load_plugins().registry
TREES = [name for name in _INSTALLED.names("draft") if _INSTALLED.get("draft", name).proposes_trees]

Table = dict[tuple[int, ...], np.ndarray[Any, np.dtype[np.float64]]]


def reference(logits: np.ndarray[Any, Any], sampling: Sampling, before: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The distribution after `before` by its definition, in float64, written apart from the one under test."""
    penalty = [sampling.repetition_penalty if token in before else 1.0 for token in range(VOCAB)]
    scaled = np.array([x / one if x > 0 else x * one for x, one in zip(logits, penalty, strict=True)])
    scaled = scaled / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    allowed = set(order[: sampling.top_k] if sampling.top_k else order)
    p = np.array([math.exp(scaled[i] - scaled.max()) if i in allowed else 0.0 for i in range(len(scaled))])
    p /= p.sum()
    kept, mass = set(), 0.0
    for i in order:
        if mass < sampling.top_p:
            kept.add(i)
        mass += p[i]
    p = np.array([value if i in kept and value >= sampling.min_p * p.max() else 0.0 for i, value in enumerate(p)])
    return p / p.sum()


@pytest.fixture(scope="module")
def target(tiny_target: Callable[..., Any]) -> Any:
    return tiny_target("qwen3", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=6)


@pytest.fixture(scope="module")
def logits(target: Any) -> Table:
    """After every prefix of fewer than TOKENS tokens, by the model's own forward pass."""
    found = {}
    with torch.no_grad():
        for length in range(TOKENS):
            for prefix in product(range(VOCAB), repeat=length):
                ids = torch.tensor([[*PROMPT, *prefix]])
                hidden = target.model.features(ids, torch.ones_like(ids), None, None, (0,)).last_hidden[0, -1]
                found[prefix] = (hidden @ target.model.head_weight().T).double().numpy()
    return found


class _Knowing:
    """Proposes from a function of the target's exact distribution after what was committed."""

    def __init__(self, tables: Table, turn: Callable[[Tensor], Tensor], *, certain: bool) -> None:
        self.max_tokens, self.taps = 2, (0,)
        self._tables, self._turn, self._certain = tables, turn, certain
        self._prefix: dict[int, tuple[int, ...]] = {}

    def open_slots(self, num_slots: int, max_length: int) -> None:
        self._prefix = {}

    def start(self, slots: Tensor, prompt_ids: Tensor, lengths: Tensor, first_token: Tensor, features: Tensor) -> None:
        self._prefix |= {slot: (token,) for slot, token in zip(slots.tolist(), first_token.tolist(), strict=True)}

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        tokens, probabilities = [], []
        for row, slot in enumerate(slots.tolist()):
            prefix, chain, given = self._prefix[slot], [], []
            for k in range(self.max_tokens):
                p = self._tables.get(prefix)
                q = self._turn(torch.full((VOCAB,), 1 / VOCAB) if p is None else torch.tensor(p, dtype=torch.float32))
                token = int(q.argmax()) if self._certain else int(draw(q, uniforms[row, k]))
                chain.append(token)
                given.append(q)
                prefix = (*prefix, token)
            tokens.append(chain)
            probabilities.append(torch.stack(given))
        lengths = torch.full_like(limits, self.max_tokens)
        own = None if self._certain else torch.stack(probabilities)
        return Proposal(tokens=torch.tensor(tokens), lengths=lengths, probabilities=own)

    def accept(self, slots: Tensor, committed_ids: Tensor, committed: Tensor, features: Tensor) -> None:
        for slot, ids, count in zip(slots.tolist(), committed_ids.tolist(), committed.tolist(), strict=True):
            self._prefix[slot] += tuple(ids[:count])

    def free(self, slots: Tensor) -> None:
        for slot in slots.tolist():
            self._prefix.pop(slot, None)


def _contrary(p: Tensor) -> Tensor:
    """Most mass where the target has least, some everywhere."""
    turned = (p.max() - p) + 0.05
    return turned / turned.sum()


@pytest.fixture(scope="module")
def small(tiny_target: Callable[..., Any]) -> Any:
    """A model that does not know the target's last id."""
    return tiny_target("llama", vocab_size=VOCAB - 1, hidden_size=16, num_hidden_layers=2)


def _proposer(kind: str, tables: Table, small: Any) -> Proposer:
    if kind == "lookup":
        return LookupProposer(LookupOptions(max_tokens=2))
    if kind == "small-lm":
        return SmallLMProposer(small.model, max_tokens=2, vocab_size=VOCAB)
    if kind == "table":
        return TableProposer(vocab_size=VOCAB, max_tokens=2, seed=3, stop_short=True)
    if kind == "trees":
        return TreeTableProposer(vocab_size=VOCAB, max_tokens=2, max_nodes=12, seed=3, stop_short=True)
    return _Knowing(tables, _contrary if kind == "contrary" else lambda p: p, certain=kind == "certain")


def _sigmas(observed: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square of the draws, as standard deviations of a normal variable (Wilson and Hilferty)."""
    total = sum(observed.values())
    assert all(expected.get(key, 0.0) > 0 for key in observed), "a sequence that cannot come"
    cells = {key: total * p for key, p in expected.items() if total * p >= LEAST_EXPECTED}
    rest = total - sum(cells.values())
    pairs = [(observed[key], mean) for key, mean in cells.items()]
    if rest > LEAST_EXPECTED:
        pairs.append((total - sum(observed[key] for key in cells), rest))
    freedom = len(pairs) - 1
    assert freedom >= 8, "too few to tell"
    chi_square = sum((count - mean) ** 2 / mean for count, mean in pairs)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)))


def _compare(target: Any, small: Any, logits: Table, sampling: Sampling, kind: str | Proposer | None) -> float:
    tables = {prefix: reference(values, sampling, PROMPT + prefix) for prefix, values in logits.items()}
    expected = {
        sequence: float(np.prod([tables[sequence[:k]][sequence[k]] for k in range(TOKENS)]))
        for sequence in product(range(VOCAB), repeat=TOKENS)
    }
    requests = [Request(id=str(i), prompt_ids=PROMPT, seed=1000 + i) for i in range(DRAWS)]
    proposer = _proposer(kind, tables, small) if isinstance(kind, str) else kind
    found = decode(
        target.model, proposer, requests, sampling=sampling, stop_ids=(), max_new_tokens=TOKENS, batch_size=1000,
        max_length=16,
    )  # fmt: skip
    return _sigmas(Counter(one.output_ids for one in found), expected)


@pytest.mark.parametrize(
    "sampling",
    [SETTINGS[0], *(pytest.param(one, marks=pytest.mark.slow) for one in SETTINGS[1:])],
    ids=str,
)
def test_sampling_has_the_exact_probabilities(target: Any, small: Any, logits: Table, sampling: Sampling) -> None:
    for kind in (None, *DRAFTS):
        assert _compare(target, small, logits, sampling, kind) < MOST_SIGMAS, kind


def test_every_option_of_sampling_at_once_has_the_exact_probabilities(target: Any, small: Any, logits: Table) -> None:
    """With a draft of each form of proposal; the others' are verified in the same way."""
    for kind in (None, "table", "lookup", "small-lm", "trees"):
        assert _compare(target, small, logits, SETTINGS[-1], kind) < MOST_SIGMAS, kind


@pytest.mark.parametrize("algorithm", TREES)
@pytest.mark.parametrize("sampling", [SETTINGS[0], pytest.param(SETTINGS[-1], marks=pytest.mark.slow)], ids=str)
def test_trees_of_a_draft_have_the_exact_probabilities(
    target: Any, small: Any, logits: Table, tiny_draft: Callable[..., DraftModel], algorithm: str, sampling: Sampling
) -> None:
    proposer = _of_opinions(tiny_draft(algorithm, target)).tree_proposer(9)
    assert _compare(target, small, logits, sampling, proposer) < MOST_SIGMAS


@pytest.mark.parametrize("algorithm", _INSTALLED.trained_drafts())
@pytest.mark.parametrize("sampling", [SETTINGS[-2], pytest.param(SETTINGS[-1], marks=pytest.mark.slow)], ids=str)
def test_a_draft_has_the_exact_probabilities_with_a_penalty(
    target: Any, small: Any, logits: Table, tiny_draft: Callable[..., DraftModel], algorithm: str, sampling: Sampling
) -> None:
    proposer = _of_opinions(tiny_draft(algorithm, target)).proposer()
    assert _compare(target, small, logits, sampling, proposer) < MOST_SIGMAS


@pytest.mark.parametrize("sampling", [SETTINGS[1], pytest.param(SETTINGS[-1], marks=pytest.mark.slow)], ids=str)
def test_distributions_in_bf16_give_the_exact_probabilities(
    target: Any, small: Any, logits: Table, sampling: Sampling
) -> None:
    proposer = TableProposer(vocab_size=VOCAB, max_tokens=2, seed=3, stop_short=True)
    proposer.logits_VV = proposer.logits_VV.bfloat16()
    assert _compare(target, small, logits, sampling, proposer) < MOST_SIGMAS


def _of_opinions(draft: DraftModel) -> DraftModel:
    """The draft with opinions, other ones than the target's."""
    draft = draft.eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return draft


def _without_residual(p_RV: Tensor, q_RV: Tensor) -> Tensor:
    return p_RV


def test_a_penalty_that_forgets_the_proposed_tokens_is_found(
    target: Any, small: Any, logits: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sampling, "after", lambda self, tokens, counted=None: self)
    assert _compare(target, small, logits, SETTINGS[-2], "table") > MOST_SIGMAS


@pytest.mark.parametrize("kind", ["contrary", "table"])
def test_a_rejection_drawn_from_the_whole_target_is_found(
    target: Any, small: Any, logits: Table, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_residual", _without_residual)
    assert _compare(target, small, logits, SETTINGS[0], kind) > MOST_SIGMAS
