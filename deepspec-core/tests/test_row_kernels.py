"""The passes over a chunk's logits, in every implementation, against their definition in float64 and autograd.

Triton decides when it is imported whether it compiles or interprets. So that no other test meets its interpreter, one
test here runs this file again in a process of its own, where the variant `interpreted` exists. The interpreter takes
what the compiler would refuse, so kernels are compiled as well, for a GPU that need not be there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.kernels.formulas import (
    Distance,
    Divergence,
    Incoming,
    Logits,
    RowKernels,
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

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="Triton is published for Linux only")
NOT_INTERPRETING = pytest.mark.skipif(INTERPRETING, reason="Triton interprets in this process")
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = (pytest.mark.gpu, NEEDS_GPU)

TRITON = pytest.param(("triton", "cuda"), id="triton-cuda", marks=ON_GPU)
if INTERPRETING:
    TRITON = pytest.param(("triton", "cpu"), id="interpreted")
VARIANTS = [
    pytest.param(("eager", "cpu"), id="eager"),
    pytest.param(("eager", "cuda"), id="eager-cuda", marks=ON_GPU),
    pytest.param(("compiled", "cuda"), id="compiled-cuda", marks=ON_GPU),
    TRITON,
]


def kernels_of(variant: tuple[str, str]) -> RowKernels:
    if variant[0] != "triton":
        return TorchKernels(compiled=variant[0] == "compiled")
    from deepspec_core.rows.kernels.triton_kernels import TritonKernels

    return TritonKernels()


@frozen(kw_only=True)
class Case:
    """What a chunk is made of. `scale`: of the logits; The four booleans: which statistics are differentiated."""

    rows: int = 5
    vocab: int = 1000
    dtype: torch.dtype = torch.float32
    correction: bool = False
    softcap: float | None = None
    ce: bool = True
    soft: bool = True
    tv: bool = True
    base: bool = False
    scale: float = 3.0


CASES = {
    "everything": Case(vocab=4099, dtype=torch.bfloat16, correction=True, softcap=8.5, base=True),
    "plain": Case(soft=False, tv=False),
    "target": Case(vocab=4099),
    "one-row": Case(rows=1, vocab=4099, dtype=torch.bfloat16),
    "correction": Case(vocab=4099, correction=True, base=True, soft=False, tv=False),
    "correction-and-target": Case(rows=1, correction=True, dtype=torch.bfloat16),
    "softcap": Case(softcap=4.0, dtype=torch.bfloat16),
    "softcap-and-correction": Case(softcap=4.0, correction=True, soft=False, tv=False),
    "several-blocks": Case(vocab=8195, dtype=torch.bfloat16, base=True, correction=True),
    "float64": Case(vocab=4099, dtype=torch.float64, correction=True, softcap=8.7, base=True),
    "float16": Case(dtype=torch.float16, correction=True, softcap=8.5),
    "disagreement": Case(scale=30.0),
    "soft-alone": Case(ce=False, tv=False, softcap=4.0),
    "tv-alone": Case(ce=False, soft=False, correction=True),
    "base-alone": Case(ce=False, soft=False, tv=False, base=True, correction=True),
}
# As drafts and targets lie in the engine's buffers, rows are further apart than they are long.
PAD = 16
FILL = 77.0


class Chunk:
    """A case's tensors on a device: products in buffers whose ends must stay as they are."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(3)
        self.stat_dtype = torch.promote_types(case.dtype, torch.float32)
        self.buffers: list[Tensor] = []
        self.draft = Logits(
            self.products(case.rows), self.products(case.rows) if case.correction else None, case.softcap
        )
        self.target = Logits(self.products(3), None, case.softcap)
        self.target_row_N = torch.tensor([0, 2, 2, 1, 0], device=device)[: case.rows]
        self.label_N = torch.randint(case.vocab, (case.rows,), generator=self.generator).to(device)
        ce, soft, tv, base = torch.randn(4, case.rows, generator=self.generator, dtype=self.stat_dtype).to(device)
        # Autograd hands over one number for all rows as a tensor without strides.
        self.incoming = Incoming(
            ce=ce if case.ce else None,
            soft=soft[:1].expand(case.rows) if case.soft else None,
            tv=tv if case.tv else None,
            ce_without_correction=base if case.base else None,
        )

    def products(self, rows: int) -> Tensor:
        values = torch.randn(rows, self.case.vocab, generator=self.generator, dtype=torch.float64) * self.case.scale
        buffer = torch.full((rows, self.case.vocab + PAD), FILL, dtype=self.case.dtype, device=self.device)
        self.buffers.append(buffer)
        buffer[:, : self.case.vocab] = values.to(self.case.dtype)
        return buffer[:, : self.case.vocab]


@frozen(kw_only=True)
class Figures:
    lse_N: Tensor
    base_lse_N: Tensor
    argmax_N: Tensor
    distance: Distance
    divergence: Divergence
    product: Tensor
    correction: Tensor | None


def figures_of(kernels: RowKernels, chunk: Chunk) -> Figures:
    """Every pass, and the gradient of what arrives, with no more than that needs."""
    draft, incoming = chunk.draft, chunk.incoming
    lse_N, base_lse_N = kernels.normaliser(draft), kernels.normaliser(draft._replace(correction=None))
    target = TargetRows(chunk.target, kernels.normaliser(chunk.target), chunk.target_row_N)
    argmax_N = kernels.argmax(draft)
    distance, divergence = (compare(draft, lse_N, target) for compare in (kernels.distance, kernels.divergence))
    kernels.gradient(
        draft,
        lse_N,
        incoming,
        label_N=None if incoming.ce is None and incoming.ce_without_correction is None else chunk.label_N,
        target=None if incoming.soft is None and incoming.tv is None else target,
        below_N=None if incoming.tv is None else distance.below,
        base_lse_N=None if incoming.ce_without_correction is None else base_lse_N,
    )
    return Figures(
        lse_N=lse_N,
        base_lse_N=base_lse_N,
        argmax_N=argmax_N,
        distance=distance,
        divergence=divergence,
        product=draft.product,
        correction=draft.correction,
    )


def definition(chunk: Chunk) -> Figures:
    """The same by softmax and autograd in float64, from the same products."""
    case = chunk.case

    def cap(product: Tensor) -> Tensor:
        return product if case.softcap is None else case.softcap * torch.tanh(product / case.softcap)

    product = chunk.draft.product.double().cpu().clone().requires_grad_()
    correction = torch.zeros_like(product)
    if chunk.draft.correction is not None:
        correction = chunk.draft.correction.double().cpu().clone()
    correction.requires_grad_()
    base, logits = cap(product), cap(product) + correction
    log_q = logits.log_softmax(-1)
    log_p = cap(chunk.target.product.double().cpu()).log_softmax(-1)[chunk.target_row_N.cpu()]
    q, p = log_q.exp(), log_p.exp()
    tv, soft_ce = (q - p).abs().sum(-1), -(p * log_q).sum(-1)
    distance = Distance(
        tv=tv,
        overlap=torch.minimum(q, p).sum(-1),
        below=torch.where(q < p, q, torch.where(q == p, q / 2, 0.0)).sum(-1),
    )
    divergence = Divergence(soft_ce=soft_ce, kl=(p * (log_p - log_q)).sum(-1))

    def at_label(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(1, chunk.label_N.cpu()[:, None])[:, 0]

    statistics = (at_label(log_q), soft_ce, tv, at_label(base.log_softmax(-1)))
    pairs = zip(chunk.incoming, statistics, strict=True)
    total = sum((one.double().cpu() * statistic).sum() for one, statistic in pairs if one is not None)
    of_product, of_correction = torch.autograd.grad(total, [product, correction], materialize_grads=True)
    return Figures(
        lse_N=logits.detach().logsumexp(-1),
        base_lse_N=base.detach().logsumexp(-1),
        argmax_N=logits.argmax(-1),
        distance=Distance(*(one.detach() for one in distance)),
        divergence=Divergence(*(one.detach() for one in divergence)),
        product=of_product,
        correction=of_correction if case.correction else None,
    )


def compared(figures: Figures) -> tuple[Tensor, ...]:
    return (*figures.distance, *figures.divergence)


def assert_close(found: Tensor, expected: Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pass_is_its_definition(variant: tuple[str, str], name: str) -> None:
    check_definition(variant, CASES[name])


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


@pytest.mark.parametrize("variant", [TRITON])
def test_the_row_engine_comes_to_the_same_as_by_autograd(variant: tuple[str, str]) -> None:
    generator, device = torch.Generator().manual_seed(2), variant[1]
    leaves = {
        name: torch.randn(shape, generator=generator).to(device).requires_grad_()
        for name, shape in {"hidden": (9, 8), "correction": (9, 4), "after": (300, 4), "confidence": (9,)}.items()
    }
    head = torch.randn(300, 8, generator=generator).to(device)
    rows = Rows(
        hidden=leaves["hidden"],
        correction=leaves["correction"],
        target_hidden=torch.randn(5, 8, generator=generator).to(device),
        target_index=torch.tensor([0, 1, 2, 1, 2, 3, 2, 3, 4], device=device),
        target_ids=torch.randint(0, 300, (9,), generator=generator).to(device),
        weight=torch.rand(9, generator=generator).to(device),
        slot=torch.arange(9, device=device) % 3,
        block=torch.arange(9, device=device) // 3,
        extras={"confidence_logits": leaves["confidence"]},
    )
    heads = Heads(draft=head, target=head, correction=leaves["after"], softcap=10.0)
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
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(dict(found.metrics), dict(expected.metrics))
        gradients = [torch.autograd.grad(one.total, list(leaves.values())) for one in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=4e-6)


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


@NEEDS_TRITON
@NOT_INTERPRETING
def test_where_triton_can_run() -> None:
    from deepspec_core.rows.kernels.triton_kernels import can_run

    assert "'cpu'" in (can_run("cpu") or "")
    if not torch.cuda.is_available():
        assert can_run("cuda") == "torch finds no CUDA device"


class AbsentGpu:
    """What Triton asks of a driver to compile, for a device that no machine has."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """compile_for(case, offset=): what the four passes over such a chunk are compiled to, by its digest."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from deepspec_core.rows.kernels.triton_kernels import TritonKernels

    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, warmup=True, **options)
        compiled[kernel.hash] = kernel
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", AbsentGpu())

    def compile_chunk(case: Case, *, offset: int = 0) -> dict[str, Any]:
        compiled.clear()
        chunk = Chunk(case)
        # Slices of a batch's tensors: where in memory they start differs from chunk to chunk.
        chunk.label_N, chunk.target_row_N = torch.zeros(2, offset + case.rows, dtype=torch.int64)[:, offset:]
        figures_of(TritonKernels(), chunk)
        return dict(compiled)

    return compile_chunk


@NEEDS_TRITON
@NOT_INTERPRETING
@pytest.mark.parametrize("full", [False, True])
def test_kernels_compile_for_a_gpu(compile_for: Callable[..., dict[str, Any]], full: bool) -> None:
    """Optional parts all there or all absent. With a vocabulary of whole vectors, loads are of 128 bits."""
    softcap = 30.0 if full else None
    compiled = compile_for(
        Case(vocab=20000, dtype=torch.bfloat16, correction=full, base=full, softcap=softcap, soft=full, tv=full)
    )
    # The normaliser of the draft, and where that has a correction, of the draft without it.
    expected = ["argmax", "distance", "divergence", "gradient", "normaliser"] + ["normaliser"] * full
    assert sorted(kernel.metadata.name for kernel in compiled.values()) == expected
    for kernel in compiled.values():
        assert "ld.global.v4" in kernel.asm["ptx"]


@NEEDS_TRITON
@NOT_INTERPRETING
def test_kernels_are_compiled_once_for_all_row_counts(compile_for: Callable[..., dict[str, Any]]) -> None:
    def chunk_of(rows: int, offset: int) -> set[str]:
        return set(compile_for(Case(rows=rows, vocab=20000, dtype=torch.bfloat16), offset=offset))

    assert chunk_of(16, 0) == chunk_of(1, 1) == chunk_of(2, 3) == chunk_of(5, 0)


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
