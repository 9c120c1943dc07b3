"""Distributions and draws: right frequencies, edge cases, one row at a time."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor

import deepspec_core.decoding.sampling as sampling_module
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.sampling import (
    distribution,
    draw,
    draw_in_turn,
    draw_tokens,
    mass_before,
    next_token,
    penalised,
)


def _logits(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


def test_greedy_is_one_hot_at_the_first_argmax() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, -1.0, 1.0]])
    assert distribution(logits, Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_temperature_divides_logits() -> None:
    logits = torch.randn(4, 9, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    found = distribution(logits, Sampling(temperature=0.5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (logits.float() * 2).softmax(-1))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1.0, top_k=2), [0, 0.4, 0, 0.3]),
        (Sampling(temperature=1.0, top_k=9), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1.0, top_p=0.65), [0, 0.4, 0, 0.3]),
        (Sampling(temperature=1.0, top_p=0.75), [0, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1.0, top_p=1e-9), [0, 0.4, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.6), [0, 0.4, 0, 0.3]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5, min_p=0.1), [0, 0.4, 0, 0.3]),
    ],
)
def test_filters_keep_what_they_should(sampling: Sampling, kept: list[float]) -> None:
    expected = torch.tensor(kept) / sum(kept)
    found = distribution(_logits(0.1, 0.4, 0.2, 0.3), sampling)
    torch.testing.assert_close(found, expected)


def test_top_p_breaks_ties_by_id() -> None:
    found = distribution(torch.zeros(2, 4), Sampling(temperature=1.0, top_p=0.5))
    assert found.tolist() == [[0.5, 0.5, 0, 0]] * 2


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.2, 0.25, 0.05, 0.0])
    count = 20000
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = draw(probs.expand(count, -1), uniforms)
    seen = torch.bincount(drawn, minlength=6)
    assert seen[probs == 0].sum() == 0
    expected = probs[probs > 0] * count
    chi_square = ((seen[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 16.27, "three degrees of freedom, p = 0.001"


def test_inverse_cdf_at_its_edges() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 1 - 1e-16, 1.0], dtype=torch.float64)
    assert draw(probs.expand(5, -1), uniforms).tolist() == [1, 1, 3, 3, 3]


def test_no_impossible_token_when_mass_is_rounded() -> None:
    vocab_size = 50_000
    probs = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(2))
    probs[:, vocab_size // 2 :] = 0
    probs /= probs.sum(-1, keepdim=True)
    drawn = draw(probs, torch.full((3,), 1 - 2**-53, dtype=torch.float64))
    assert (probs.gather(1, drawn[:, None]) > 0).all()
    assert (draw(probs * 0.9, torch.ones(3)) < vocab_size // 2).all()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(8, 3, 100, generator=generator), torch.rand(8, 3, generator=generator)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=50, min_p=0.01)
    together = distribution(logits, sampling)
    drawn = draw(together, uniforms)
    assert drawn.shape == (8, 3)
    for row in range(8):
        alone = distribution(logits[row], sampling)
        # A row inside a batch begins at another address.
        torch.testing.assert_close(alone, together[row], rtol=1e-6, atol=1e-7)
        assert torch.equal(draw(alone, uniforms[row]), drawn[row])


def _steep_and_flat(rows: int, vocab_size: int) -> torch.Tensor:
    """Rows from nearly certain to nearly uniform, with many equal logits among them."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(rows, vocab_size, generator=generator) * torch.linspace(0.01, 8, rows)[:, None]
    return (logits * 4).round() / 4


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_keeps_what_a_full_sort_keeps(top_p: float) -> None:
    logits = _steep_and_flat(24, 3000)
    probs = logits.softmax(-1)
    sorted_, order = probs.sort(dim=-1, descending=True, stable=True)
    beyond = sorted_.cumsum(-1, dtype=torch.float64) - sorted_ >= top_p
    kept = torch.empty_like(beyond).scatter_(-1, order, ~beyond)
    assert kept.sum(1).min() < 256 < kept.sum(1).max(), "both by candidates and by the fall-back"
    assert torch.equal(distribution(logits, Sampling(temperature=1.0, top_p=top_p)) > 0, kept)


@pytest.mark.parametrize("vocab_size", [512, 513, 1024, 3000])
def test_draws_in_blocks_are_those_of_one_cumulative_sum(vocab_size: int) -> None:
    probs = _steep_and_flat(16, vocab_size).softmax(-1)
    probs[::2, : vocab_size // 3] = 0
    uniforms = torch.rand(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    uniforms[:, :2] = torch.tensor([0.0, 1 - 2**-53])
    drawn = draw(probs[:, None].expand(-1, 64, -1), uniforms)
    mass = probs.double().cumsum(-1)
    point = uniforms * mass[:, -1:]
    at, before = mass.gather(1, drawn), mass.gather(1, drawn) - probs.double().gather(1, drawn)
    # Sums of a block are rounded to fp32.
    assert (point < at + 1e-6).all()
    assert (before - 1e-6 <= point).all()
    assert (probs.gather(1, drawn) > 0).all()
    below, total = mass_before(probs[:, None].expand(-1, 64, -1), drawn)
    torch.testing.assert_close(below, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(total, mass[:, -1:].expand_as(total), rtol=1e-6, atol=0)


def _seen(*rows: set[int], vocab_size: int) -> torch.Tensor:
    return torch.tensor([[token in row for token in range(vocab_size)] for row in rows])


def test_the_order_of_the_settings_is_that_of_transformers() -> None:
    from transformers import generation

    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(5, 40, generator=generator)
    ids = torch.randint(40, (5, 9), generator=generator)
    processors = generation.LogitsProcessorList(
        [
            generation.RepetitionPenaltyLogitsProcessor(1.7),
            generation.TemperatureLogitsWarper(0.8),
            generation.TopKLogitsWarper(20),
            generation.TopPLogitsWarper(0.9),
            generation.MinPLogitsWarper(0.02),
        ]
    )
    expected = processors(ids, logits).softmax(-1)
    sampling = Sampling(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.7,
        seen=_seen(*(set(row) for row in ids.tolist()), vocab_size=40),
    )  # fmt: skip
    torch.testing.assert_close(distribution(penalised(logits, sampling), sampling), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_counts_the_tokens_that_were_just_drawn(temperature: float) -> None:
    logits = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(7)) * 2
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    seen = ({1, 2}, {3}, {4, 5, 6})
    sampling = Sampling(temperature=temperature, repetition_penalty=3.0, seen=_seen(*seen, vocab_size=12))
    tokens, _ = draw_tokens(logits, sampling, uniforms)
    for row in range(3):
        known = set(seen[row])
        for k in range(4):
            own = Sampling(temperature=temperature, repetition_penalty=3.0, seen=_seen(known, vocab_size=12))
            token, _ = next_token(logits[row, k][None], own, uniforms[row, k][None])
            assert token.item() == tokens[row, k]
            known.add(int(token))
    assert sampling.seen is not None
    assert sampling.seen.sum() == 6, "what was given stays as it is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_block_is_drawn_in_turns_with_equal_results(
    dtype: torch.dtype, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = (3 * torch.randn(5, 4, 900, generator=torch.Generator().manual_seed(7))).to(dtype)
    uniforms = torch.rand(5, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    sampling = Sampling(temperature=0.9, top_p=top_p)
    whole, probs = draw_tokens(logits, sampling, uniforms)
    monkeypatch.setattr(sampling_module, "_CHUNK_CPU", 1800)
    with LargestTensor() as largest:
        parts, probs_of_parts = draw_tokens(logits, sampling, uniforms)
    assert probs is not None
    assert probs_of_parts is not None
    assert probs.dtype == probs_of_parts.dtype == dtype
    assert torch.equal(parts, whole)
    assert torch.equal(probs_of_parts, probs)
    assert torch.equal(draw(probs, uniforms[:, :4]), whole), "drawn from what is given, rounded or not"
    torch.testing.assert_close(probs.float(), distribution(logits, sampling), rtol=2**-8, atol=0)
    if dtype == torch.bfloat16:
        assert largest.numel <= 1800 < logits.numel(), "the distributions never stand in fp32 at once"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_in_turn_are_each_given_the_one_before(temperature: float) -> None:
    logits_VV = torch.randn(12, 12, generator=torch.Generator().manual_seed(7)) * 2
    uniforms = torch.rand(3, 4, generator=torch.Generator().manual_seed(8))
    last, sampling = torch.tensor([5, 0, 11]), Sampling(temperature=temperature)
    tokens, probs = draw_in_turn(lambda k, previous: logits_VV[previous] / (k + 1), last, sampling, uniforms)
    for k in range(4):
        previous = last if k == 0 else tokens[:, k - 1]
        token, q = next_token(logits_VV[previous] / (k + 1), sampling, uniforms[:, k])
        assert torch.equal(tokens[:, k], token)
        assert (probs is None) == (temperature == 0)
        if probs is not None:
            assert torch.equal(probs[:, k], q)
