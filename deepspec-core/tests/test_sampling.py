"""Distributions and draws: right frequencies, edge cases, one row at a time."""

from __future__ import annotations

import pytest
import torch

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.sampling import distribution, draw


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
