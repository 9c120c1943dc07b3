"""Verification against the definition: distributions of what is committed, stop tokens, ragged proposals."""

import pytest
import torch
from attrs import evolve
from largest_tensor import LargestTensor

import deepspec_core.decoding.sampling as sampling_module
from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.sampling import draw
from deepspec_core.decoding.tree import seen_columns, verify_tree
from deepspec_core.decoding.verify import Verdict, verify

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


def test_distributions_in_bf16_leave_the_target_distribution_unchanged() -> None:
    """Their sum is not 1. Every uniform number of a grid is tried, so the probabilities of what is committed are known
    to a part in 100,000."""
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    p = torch.tensor([0.44, 0.22, 0.19, 0.15])
    q = torch.tensor([0.5019, 0.2509, 0.1255, 0.1217]).bfloat16()
    assert abs(float(q.double().sum()) - 1) > 1e-3
    drafted = torch.bincount(draw(q.expand(len(grid), 4), grid), minlength=4) / len(grid)
    torch.testing.assert_close(drafted.double(), q.double() / q.double().sum(), rtol=0, atol=2e-5)

    def committed(token: int, accept: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row: whether the token was accepted, and the first committed token."""
        rows = len(grid)
        proposal = Proposal(
            tokens=torch.full((rows, 1), token),
            lengths=torch.ones(rows, dtype=torch.long),
            probabilities=q.expand(rows, 1, 4).contiguous(),
        )
        uniforms = torch.stack([accept.expand(rows), own.expand(rows)], dim=1)
        found = verify(p.log().expand(rows, 2, 4), proposal, sampling=SAMPLED, uniforms=uniforms, stop_ids=())
        return found.accepted.bool(), found.tokens[:, 0]

    total = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        share = committed(token, grid, grid[0])[0].double().mean()
        total[token] += drafted[token] * share
        if share < 1:
            rejected, tokens = committed(token, grid[-1], grid)
            assert not rejected.any()
            total += drafted[token] * (1 - share) * torch.bincount(tokens, minlength=4) / len(grid)
    torch.testing.assert_close(total, p.double(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "padding", [[torch.inf, 0.0, 0.0, 0.0], [torch.nan] * 4, [3e38, -3e38, 0.0, 1e-3]], ids=["inf", "NaN", "finite"]
)
def test_padding_of_distributions_changes_nothing(dtype: torch.dtype, padding: list[float]) -> None:
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    p, rows = torch.tensor([0.1, 0.2, 0.3, 0.4]), len(grid)
    proposal = Proposal(
        tokens=torch.zeros(rows, 1, dtype=torch.long),
        lengths=torch.zeros(rows, dtype=torch.long),
        probabilities=torch.tensor(padding).to(dtype).expand(rows, 1, 4).contiguous(),
    )
    uniforms = torch.stack([torch.full_like(grid, 0.5), grid], dim=1)
    found = verify(p.log().expand(rows, 2, 4), proposal, sampling=SAMPLED, uniforms=uniforms, stop_ids=())
    torch.testing.assert_close(torch.bincount(found.tokens[:, 0], minlength=4) / rows, p, rtol=0, atol=2e-3)


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


def _case(sampling: Sampling, *, tree: bool = False) -> tuple[torch.Tensor, Proposal, Sampling, torch.Tensor]:
    """bf16 logits of 6 sequences, 4 draft tokens and 900 ids, and a proposal that is often right."""
    generator = torch.Generator().manual_seed(7)
    logits = (4 * torch.randn(6, 5, 900, generator=generator)).bfloat16()
    uniforms = torch.rand(6, 9, generator=generator, dtype=torch.float64)
    seen = torch.rand(6, 900, generator=generator) < 0.1
    sampling = evolve(sampling, seen=seen) if sampling.repetition_penalty != 1 else sampling
    q = (logits[:, :4].float() + torch.randn(6, 4, 900, generator=generator)).softmax(-1)
    tokens = draw(q, uniforms[:, :4])
    lengths = torch.tensor([4, 4, 3, 4, 0, 2])
    if tree:
        parents = torch.tensor([[-1, -1, 0, 2]]).expand(6, -1)
        return logits, Proposal(tokens=logits[:, :4].argmax(-1), lengths=lengths, parents=parents), sampling, uniforms
    return logits, Proposal(tokens=tokens, lengths=lengths, probabilities=q), sampling, uniforms[:, 4:]


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SAMPLED, Sampling(repetition_penalty=1.5), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.5)],
    ids=str,
)
def test_rows_are_taken_in_turns_with_equal_results(
    sampling: Sampling, tree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, proposal, sampling, uniforms = _case(sampling, tree=tree)

    def decided() -> tuple[Verdict, int]:
        with LargestTensor() as largest:
            if tree:
                depths = seen_columns(proposal.parents).sum(2) - 1
                found = verify_tree(
                    logits, proposal, depths, sampling=sampling, uniforms=uniforms[:, :4], stop_ids=(3,)
                )
            else:
                found = verify(logits, proposal, sampling=sampling, uniforms=uniforms, stop_ids=(3,))
        return found, largest.numel

    whole, _ = decided()
    monkeypatch.setattr(sampling_module, "_CHUNK_CPU", 1800)
    parts, most = decided()
    assert most <= 1800 < logits.numel()
    assert torch.equal(parts.accepted, whole.accepted)
    assert torch.equal(parts.committed, whole.committed)
    for row, count in enumerate(whole.committed.tolist()):
        assert torch.equal(parts.tokens[row, :count], whole.tokens[row, :count])
    assert whole.accepted.sum() > 0
