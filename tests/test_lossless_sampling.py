"""Sampling at temperature 1 is lossless for every algorithm: speculation and plain sampling give the same distribution
of the first three tokens, by chi-square over fixed seeds; and a verifier that accepts everything is found out.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepspec_core.decoding.engine as engine_module
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.plugins.discovery import load_plugins

ALGORITHMS = load_plugins().registry.trained_drafts()
DRAWS = 3000
ENOUGH = 20  # times a sequence must occur, in both together, to be counted

Counts = Counter[tuple[int, ...]]


def first_tokens(target: Any, proposer: Proposer | None, *, first_seed: int) -> Counts:
    requests = [Request(id=str(i), prompt_ids=(3, 4, 5), seed=first_seed + i) for i in range(DRAWS)]
    found = decode(
        target.model, proposer, requests, sampling=Sampling(temperature=1.0), stop_ids=(1,), max_new_tokens=3,
        batch_size=500, max_length=16,
    )  # fmt: skip
    return Counter(completion.output_ids for completion in found)


def chi_square_per_degree(observed: Counts, expected: Counts) -> float:
    """Two-sample chi-square over sequences common enough to count, per degree of freedom: 1 when both are alike."""
    keys = [key for key in expected | observed if observed[key] + expected[key] >= ENOUGH]
    total = sum((observed[key] - expected[key]) ** 2 / (observed[key] + expected[key]) for key in keys)
    assert len(keys) > 30, "too few to tell"
    return total / (len(keys) - 1)


@pytest.fixture(scope="module")
def target(tiny_target: Callable[..., Any]) -> Any:
    return tiny_target("qwen3", vocab_size=8, hidden_size=16, num_hidden_layers=6)


@pytest.fixture(scope="module")
def plain(target: Any) -> Counts:
    return first_tokens(target, None, first_seed=0)


@pytest.mark.parametrize(
    ("algorithm", "known"),
    [
        *((name, None) for name in ALGORITHMS),
        ("eagle3", (0, 1, 3, 4, 6)),
        pytest.param("dspark", (0, 1, 3, 4, 6), marks=pytest.mark.slow),
    ],
)
def test_speculation_samples_as_the_target_does_and_a_broken_verifier_does_not(
    algorithm: str,
    known: tuple[int, ...] | None,
    target: Any,
    plain: Counts,
    tiny_draft: Callable[..., DraftModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = tiny_draft(algorithm, target, vocab_size=known and len(known)).eval()
    if draft.vocabulary is not None:
        draft.vocabulary.choose(torch.tensor(known))
        draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)  # a draft of opinions, other ones than the target's
    proposer = draft.proposer()
    assert chi_square_per_degree(first_tokens(target, proposer, first_seed=DRAWS), plain) < 1.5

    def accept_everything(logits_BKV: torch.Tensor, proposal: Any, **settings: Any) -> Any:
        settings["uniforms"] = torch.zeros_like(settings["uniforms"])
        return verify(logits_BKV, proposal, **settings)

    verify = engine_module.verify
    monkeypatch.setattr(engine_module, "verify", accept_everything)
    assert chi_square_per_degree(first_tokens(target, proposer, first_seed=DRAWS), plain) > 3
