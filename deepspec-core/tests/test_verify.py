"""Verification against the definition: distributions of what is committed, stop tokens, ragged proposals."""

import torch

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import draw
from deepspec_core.decoding.verify import verify

SAMPLED = Sampling(temperature=1.0)
GREEDY = Sampling(temperature=0.0)


def test_one_draft_token_leaves_the_target_distribution_unchanged() -> None:
    """Over many independent rows the first committed token follows p although it was drafted from q."""
    rows = 200_000
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    q = torch.tensor([0.1, 0.6, 0.2, 0.1])
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    tokens = draw(q.expand(rows, 4), uniforms[:, 0])[:, None]
    proposal = Proposal(
        tokens=tokens, lengths=torch.ones(rows, dtype=torch.long), probabilities=q.expand(rows, 1, 4).contiguous()
    )
    logits = p.log().expand(rows, 2, 4)
    verdict = verify(logits, proposal, sampling=SAMPLED, uniforms=uniforms[:, 1:], stop_ids=())
    observed = torch.bincount(verdict.tokens[:, 0], minlength=4) / rows
    assert (observed - p).abs().max() < 0.005
    # The share accepted is 1 - tv / 2 where tv is the L1 distance.
    assert abs((verdict.accepted == 1).float().mean() - (1 - (p - q).abs().sum() / 2)) < 0.005


def test_deterministic_proposal_counts_as_one_hot() -> None:
    rows = 100_000
    p = torch.tensor([0.7, 0.3])
    proposal = Proposal(tokens=torch.ones(rows, 1, dtype=torch.long), lengths=torch.ones(rows, dtype=torch.long))
    uniforms = torch.rand(rows, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    verdict = verify(p.log().expand(rows, 2, 2), proposal, sampling=SAMPLED, uniforms=uniforms, stop_ids=())
    assert abs((verdict.tokens[:, 0] == 1).float().mean() - 0.3) < 0.005
    assert (verdict.tokens[verdict.accepted == 0, 0] == 0).all()


def _greedy(best: list[int], drafted: list[int], length: int, stop_ids: tuple[int, ...] = ()):
    logits = torch.nn.functional.one_hot(torch.tensor([best]), 10).float()
    proposal = Proposal(tokens=torch.tensor([drafted]), lengths=torch.tensor([length]))
    verdict = verify(logits, proposal, sampling=GREEDY, uniforms=torch.zeros(1, 4), stop_ids=stop_ids)
    committed = int(verdict.committed)
    return verdict.tokens[0, :committed].tolist(), int(verdict.accepted), int(verdict.proposal_lengths)


def test_greedy_commits_the_argmaxes() -> None:
    assert _greedy([3, 4, 5, 6], [3, 4, 5], 3) == ([3, 4, 5, 6], 3, 3)
    assert _greedy([3, 4, 5, 6], [3, 7, 5], 3) == ([3, 4], 1, 3)
    assert _greedy([3, 4, 5, 6], [8, 4, 5], 3) == ([3], 0, 3)


def test_tokens_past_the_proposed_length_never_count() -> None:
    assert _greedy([3, 4, 5, 6], [3, 4, 5], 1) == ([3, 4], 1, 1)
    assert _greedy([3, 4, 5, 6], [3, 4, 5], 0) == ([3], 0, 0)


def test_an_accepted_stop_token_ends_the_round_without_an_extra_token() -> None:
    assert _greedy([3, 4, 5, 6], [3, 4, 5], 3, stop_ids=(4,)) == ([3, 4], 2, 2)
    # A stop token that is proposed but rejected does not.
    assert _greedy([3, 4, 5, 6], [3, 9, 5], 3, stop_ids=(9,)) == ([3, 4], 1, 3)
    # The target's own token may be a stop token: it is the extra token.
    assert _greedy([3, 4, 5, 6], [3, 9, 5], 3, stop_ids=(4,)) == ([3, 4], 1, 3)
