"""The passes over a chunk's logits, in every implementation, against their definition in float64 and autograd.

Triton decides when it is imported whether it compiles or interprets. So that no other test meets its interpreter, one
test here runs this file again in a process of its own, where the variant `interpreted` exists.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from row_passes import (
    CASES,
    FILL,
    NEEDS_GPU,
    NEEDS_TRITON,
    NOT_INTERPRETING,
    TRITON,
    VARIANTS,
    Case,
    Chunk,
    assert_close,
    compared,
    definition,
    figures_of,
    kernels_of,
)

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.kernels.formulas import (
    Incoming,
    Logits,
    TargetRows,
    TorchKernels,
    why_not_compiled,
)
from deepspec_core.rows.terms import (
    Confidence,
    CrossEntropy,
    NegativeLogAcceptance,
    SoftCrossEntropy,
    TotalVariation,
)
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pass_is_its_definition(variant: tuple[str, str], name: str) -> None:
    check_definition(variant, CASES[name])


@pytest.mark.slow
def test_compiled_passes_are_their_definition_too() -> None:
    """Once, with everything: the formulas are those of "eager", and building them takes seconds each."""
    reason = why_not_compiled()
    if reason is not None:
        pytest.skip(reason)
    check_definition(("compiled", "cpu"), CASES["everything"])


@pytest.mark.parametrize("first", [-200.0, float("-inf"), float("nan")])
def test_compiled_normaliser_where_the_first_columns_mislead(first: float) -> None:
    """They are taken for near the greatest logit; exp(200) is out of range."""
    reason = why_not_compiled()
    if reason is not None:
        pytest.skip(reason)
    product = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    product[1, :4500] = first
    found = TorchKernels(compiled=True).normaliser(Logits(product))
    torch.testing.assert_close(found, product.logsumexp(-1), rtol=4e-6, atol=4e-6, equal_nan=True)


def check_definition(variant: tuple[str, str], case: Case) -> None:
    chunk = Chunk(case, variant[1])
    expected = definition(chunk)
    found = figures_of(kernels_of(variant), chunk)
    double = case.dtype == torch.float64
    close = {"rtol": 1e-13, "atol": 1e-13} if double else {"rtol": 1e-5, "atol": 4e-6}
    assert found.lse_N.dtype == found.divergence.kl.dtype == chunk.stat_dtype
    assert_close(found.lse_N, expected.lse_N, **close)
    assert_close(found.base_lse_N, expected.base_lse_N, **close)
    assert found.argmax_N.tolist() == expected.argmax_N.tolist()
    for figure, by_definition in zip(compared(found), compared(expected), strict=True):
        assert_close(figure, by_definition, **close)
    # A step of the products' own dtype: the interpreter cuts bits off where devices round.
    gradient_close = {**close, "rtol": max(close["rtol"], torch.finfo(case.dtype).eps)}
    assert_close(found.product, expected.product, **gradient_close)
    assert (found.correction is None) == (expected.correction is None)
    if found.correction is not None:
        assert_close(found.correction, expected.correction, **gradient_close)
    for buffer in chunk.buffers:
        assert (buffer[:, case.vocab :] == FILL).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_draft_like_the_target_has_no_distance_and_no_gradient(variant: tuple[str, str]) -> None:
    chunk = Chunk(Case(vocab=4099), variant[1])
    chunk.draft.product.copy_(chunk.target.product[chunk.target_row_N])
    chunk.incoming = chunk.incoming._replace(ce=None)
    found = figures_of(kernels_of(variant), chunk)
    nothing = torch.zeros(5, device=variant[1])
    assert torch.equal(found.distance.tv, nothing)
    assert torch.equal(found.divergence.kl, nothing)
    torch.testing.assert_close(found.distance.overlap, nothing + 1.0)
    torch.testing.assert_close(found.distance.below, nothing + 0.5)
    torch.testing.assert_close(found.product, torch.zeros_like(found.product))


@pytest.mark.parametrize("variant", VARIANTS)
def test_argmax_is_the_first_of_equals(variant: tuple[str, str]) -> None:
    product = torch.zeros(3, 20000, device=variant[1])
    product[0, [17000, 9000, 12345]] = 2.0
    product[2] = float("-inf")
    assert kernels_of(variant).argmax(Logits(product)).tolist() == [9000, 0, 0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_numbers_keep_it_to_themselves(variant: tuple[str, str]) -> None:
    inf, nan = float("inf"), float("nan")
    chunk, sound = Chunk(Case(vocab=4099), variant[1]), Chunk(Case(vocab=4099), variant[1])
    chunk.draft.product[0, 4098] = nan
    chunk.draft.product[1, 7] = inf
    chunk.draft.product[3] = nan
    found, expected = figures_of(kernels_of(variant), chunk), definition(sound)
    assert found.lse_N[[0, 3]].isnan().all()
    assert not found.lse_N[1].isfinite()
    assert int(found.argmax_N.min()) >= 0
    assert int(found.argmax_N.max()) < 4099
    assert int(found.argmax_N[1]) == 7
    for figure, by_definition in zip(compared(found), compared(expected), strict=True):
        assert figure[[0, 1, 3]].isnan().all()
        assert_close(figure[[2, 4]], by_definition[[2, 4]], rtol=4e-6, atol=4e-6)
    assert found.product[[0, 1, 3]].isnan().any(-1).all()
    assert_close(found.product[[2, 4]], expected.product[[2, 4]], rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_impossible_tokens_have_no_mass_and_no_gradient(variant: tuple[str, str]) -> None:
    chunk = Chunk(Case(vocab=9000, soft=False, tv=False), variant[1])  # more than a block of them
    chunk.label_N.fill_(1)
    chunk.draft.product[:, 500:] = float("-inf")
    expected = definition(chunk)
    found = figures_of(kernels_of(variant), chunk)
    assert_close(found.lse_N, expected.lse_N, rtol=4e-6, atol=4e-6)
    assert_close(found.distance.tv, expected.distance.tv, rtol=4e-6, atol=4e-6)
    assert_close(found.product, expected.product, rtol=4e-6, atol=4e-6)
    assert (found.product[:, 500:] == 0).all()


@pytest.mark.parametrize("variant", [TRITON])
def test_no_rows(variant: tuple[str, str]) -> None:
    chunk = Chunk(Case(rows=0, correction=True, base=True), variant[1])
    found = figures_of(kernels_of(variant), chunk)
    assert [len(one) for one in (found.lse_N, found.argmax_N, *compared(found))] == [0] * 7


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("variant", [TRITON])
def test_the_row_engine_comes_to_the_same_as_by_autograd(variant: tuple[str, str], reduced: bool) -> None:
    generator, device = torch.Generator().manual_seed(2), variant[1]
    leaves = {
        name: torch.randn(shape, generator=generator).to(device).requires_grad_()
        for name, shape in {"hidden": (9, 8), "correction": (9, 4), "after": (300, 4), "confidence": (9,)}.items()
    }
    head = target = torch.randn(300, 8, generator=generator).to(device)
    if reduced:
        target = torch.randn(400, 8, generator=generator).to(device)
    weight = torch.rand(9, generator=generator)
    weight[4] = 0.0  # not there, so neither is what it holds
    leaves["hidden"].detach()[4] = float("nan")
    rows = Rows(
        hidden=leaves["hidden"],
        correction=leaves["correction"],
        target_hidden=torch.randn(5, 8, generator=generator).to(device),
        target_index=torch.tensor([0, 1, 2, 1, 2, 3, 2, 3, 4], device=device),
        target_ids=torch.randint(0, 300, (9,), generator=generator).to(device),
        weight=weight.to(device),
        slot=torch.arange(9, device=device) % 3,
        block=torch.arange(9, device=device) // 3,
        extras={"confidence_logits": leaves["confidence"]},
    )
    ids_D = torch.arange(300, device=device) + 50 if reduced else None
    heads = Heads(draft=head, target=target, correction=leaves["after"], softcap=10.0, draft_ids=ids_D)
    terms = {
        "ce": (CrossEntropy(), 0.1),
        "tv": (TotalVariation(), 0.9),
        "lk": (NegativeLogAcceptance(), 0.5),
        "soft_ce": (SoftCrossEntropy(), 0.5),
        "confidence": (Confidence(), 1.0),
    }
    for chunk_rows in (3, None):
        found, expected = (
            RowEngine(terms, Decay(DecayOptions()), chunk_rows, kernels=kernels)(rows, heads, with_metrics=True)
            for kernels in ("triton", "plain")
        )
        assert found.total.isfinite()
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(dict(found.metrics), dict(expected.metrics))
        gradients = [torch.autograd.grad(one.total, list(leaves.values())) for one in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=4e-6)


@pytest.mark.slow
@NEEDS_TRITON
@NOT_INTERPRETING
def test_interpreter_runs_the_kernels_on_this_cpu() -> None:
    """Fails, not skips, where Triton is missing: requirements-dev.txt has it."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


@pytest.mark.gpu
@NEEDS_GPU
def test_same_input_same_bits() -> None:
    case = Case(rows=5, vocab=151936, dtype=torch.bfloat16, correction=True, base=True)
    first, second = (figures_of(kernels_of(("triton", "cuda")), Chunk(case, "cuda")) for _ in range(2))
    for one, other in (
        (first.lse_N, second.lse_N),
        (first.product, second.product),
        *zip(compared(first), compared(second), strict=True),
    ):
        assert torch.equal(one, other)


@pytest.mark.gpu
@NEEDS_GPU
def test_rows_beyond_two_to_the_31() -> None:
    stride = (1 << 30) + 8
    storage = torch.empty(2 * stride + 4096, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((3, 4096), (stride, 1))
    near = torch.randn(3, 4096, device="cuda").to(torch.bfloat16)
    far.copy_(near)
    row_N = torch.arange(3, device="cuda")
    found = []
    for product in (far, near):
        kernels, logits = kernels_of(("triton", "cuda")), Logits(product)
        lse_N = kernels.normaliser(logits)
        divergence = kernels.divergence(logits, lse_N, TargetRows(logits, lse_N, row_N))
        kernels.gradient(logits, lse_N, Incoming(ce=torch.ones_like(lse_N)), label_N=row_N)
        found.append((lse_N, divergence.soft_ce, product))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
