"""The row engine against a plain float64 computation: every mix of terms, weighting, chunking and optional input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec_core.blocks.losses import CrossEntropy, TotalVariation
from deepspec_core.blocks.row_engine import RowEngine, chunk_spans
from deepspec_core.blocks.weightings import Decay, Uniform
from deepspec_core.config.weighting_options import DecayOptions
from deepspec_core.contracts.loss import RowStats
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.errors import ConfigError

BLOCKS, K, H, V, P, R = 7, 3, 5, 11, 6, 2
N = BLOCKS * K


class Confidence:
    """A term on an extra: squared distance of its sigmoid to the acceptance."""

    needs_target = True
    needs_extras = ("confidence_logits",)

    def __call__(self, stats: RowStats) -> Tensor:
        return (stats.extras["confidence_logits"].sigmoid() - stats.acceptance) ** 2


CE, TV, CONFIDENCE = ("ce", CrossEntropy()), ("tv", TotalVariation()), ("confidence", Confidence())
MIXES = {
    "ce": {CE[0]: (CE[1], 1.0)},
    "tv": {TV[0]: (TV[1], 1.0)},
    "mix": {CE[0]: (CE[1], 0.1), TV[0]: (TV[1], 0.9)},
    "confidence": {CE[0]: (CE[1], 0.1), TV[0]: (TV[1], 0.9), CONFIDENCE[0]: (CONFIDENCE[1], 2.0)},
}


def make(
    *,
    correction: bool = False,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
    train_head: bool = False,
) -> tuple[Rows, Heads, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {"hidden": normal(N, H).requires_grad_(), "confidence": normal(N).requires_grad_()}
    head = normal(V, H).requires_grad_(train_head)
    target = normal(V, H) if train_head else head
    if train_head:
        leaves["head"] = head
    if correction:
        leaves["correction"] = normal(N, R).requires_grad_()
        leaves["correction_head"] = normal(V, R).requires_grad_()
    weight = torch.rand(N, generator=generator)
    weight[[2, 8, 9, 10, 11]] = 0.0
    rows = Rows(
        hidden=leaves["hidden"],
        correction=leaves.get("correction"),
        target_hidden=normal(P, H),
        target_index=torch.randint(0, P, (N,), generator=generator),
        target_ids=torch.randint(0, V, (N,), generator=generator),
        weight=weight,
        slot=torch.arange(N) % K,
        block=torch.arange(N) // K,
        extras={"confidence_logits": leaves["confidence"]},
    )
    return rows, Heads(draft=head, target=target, correction=leaves.get("correction_head"), softcap=softcap), leaves


def naive(rows: Rows, heads: Heads, terms: dict[str, Any], gamma: float | None) -> tuple[Tensor, Tensor]:
    """Total and weights from all logits at once, written down from the definitions."""

    def cap(logits: Tensor) -> Tensor:
        return logits if heads.softcap is None else heads.softcap * torch.tanh(logits / heads.softcap)

    draft = cap(rows.hidden.double() @ heads.draft.double().T)
    if rows.correction is not None:
        assert heads.correction is not None
        draft = draft + rows.correction.double() @ heads.correction.double().T
    assert rows.target_hidden is not None
    target = cap(rows.target_hidden.double() @ heads.target.double().T)[rows.target_index].softmax(-1)
    probabilities = draft.softmax(-1)
    tv = (probabilities - target).abs().sum(-1)
    values = {
        "ce": -probabilities.gather(1, rows.target_ids[:, None])[:, 0].log(),
        "tv": tv,
        "confidence": (rows.extras["confidence_logits"].double().sigmoid() - (1 - tv.detach() / 2)) ** 2,
    }
    weight = rows.weight.double() * (1.0 if gamma is None else torch.exp(-rows.slot.double() / gamma))
    return sum(weight * coefficient * values[name] for name, (_, coefficient) in terms.items()).sum(), weight  # type: ignore[union-attr]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("correction", "softcap", "train_head"), list(itertools.product((False, True), (None, 2.0), (False, True)))
)
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_equals_the_definition(
    mix: str, correction: bool, softcap: float | None, train_head: bool, chunk_rows: int | None
) -> None:
    rows, heads, leaves = make(correction=correction, softcap=softcap, train_head=train_head)
    gamma = 4.0 if correction else None
    engine = RowEngine(MIXES[mix], Decay(DecayOptions(gamma=gamma)) if gamma else Uniform(), chunk_rows)
    expected, weight = naive(rows, heads, MIXES[mix], gamma)
    wanted = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)

    result = engine(rows, heads)
    # Not 1: what comes in must be multiplied with.
    (result.total * 3.0).backward()

    torch.testing.assert_close(result.total, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.denominator.double(), weight.sum(), rtol=1e-6, atol=1e-6)
    for leaf, gradient in zip(leaves.values(), wanted, strict=True):
        assert leaf.grad is not None
        target = torch.zeros_like(leaf) if gradient is None else 3.0 * gradient
        torch.testing.assert_close(leaf.grad, target, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_fp32_and_bf16_products(chunk_rows: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        rows, heads, leaves = make(correction=True, dtype=dtype)
        expected, _ = naive(rows, heads, MIXES["mix"], None)
        (gradient,) = torch.autograd.grad(expected, leaves["correction_head"])
        result = RowEngine(MIXES["mix"], Uniform(), chunk_rows)(rows, heads)
        result.total.backward()
        assert result.total.dtype == torch.float32
        torch.testing.assert_close(result.total.double(), expected, rtol=tolerance, atol=tolerance)
        assert leaves["correction_head"].grad is not None
        assert leaves["correction_head"].grad.dtype == dtype
        torch.testing.assert_close(leaves["correction_head"].grad, gradient, rtol=4 * tolerance, atol=4 * tolerance)


def test_autocast_chooses_the_products_dtype_only() -> None:
    rows, heads, leaves = make(dtype=torch.float32)
    engine = RowEngine(MIXES["ce"], Uniform())
    plain = engine(rows, heads).total
    for _ in range(2):  # the second time with the kept copy of the head
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = engine(rows, heads)
        result.total.backward()
        assert result.total.dtype == torch.float32
        assert result.total != plain
        torch.testing.assert_close(result.total, plain, rtol=2e-2, atol=2e-2)
        assert leaves["hidden"].grad is not None
        assert leaves["hidden"].grad.dtype == torch.float32
    assert not heads.draft.requires_grad
    with torch.no_grad():
        heads.draft.mul_(0.0)  # a kept copy must notice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine(rows, heads).total.item() == pytest.approx(
            rows.weight.sum().item() * torch.tensor(V).log().item()
        )


def test_gradcheck() -> None:
    rows, heads, leaves = make(correction=True, softcap=3.0, train_head=True)
    engine = RowEngine(MIXES["mix"], Decay(DecayOptions()), 4)

    def total(hidden: Tensor, head: Tensor, correction: Tensor, correction_head: Tensor) -> Tensor:
        moved = Rows(
            hidden=hidden, correction=correction, target_hidden=rows.target_hidden, target_index=rows.target_index,
            target_ids=rows.target_ids, weight=rows.weight, slot=rows.slot, block=rows.block,
        )  # fmt: skip
        return engine(moved, Heads(draft=head, target=heads.target, correction=correction_head, softcap=3.0)).total

    inputs = [leaves[name] for name in ("hidden", "head", "correction", "correction_head")]
    assert torch.autograd.gradcheck(total, inputs)


def test_rows_without_labels_are_compared_with_the_targets_argmax() -> None:
    rows, heads, _ = make()
    assert rows.target_hidden is not None
    assert rows.target_index is not None
    argmax = (rows.target_hidden @ heads.target.mT).argmax(-1)[rows.target_index]
    fields = {name: getattr(rows, name) for name in Rows.__slots__ if name not in ("target_ids", "__weakref__")}
    engine = RowEngine(MIXES["ce"], Uniform(), 4)
    found = engine(Rows(**fields), heads, with_metrics=True)
    expected = engine(Rows(**fields, target_ids=argmax), heads, with_metrics=True)
    assert found.metrics == expected.metrics
    assert found.total != engine(rows, heads).total


def test_no_gradient_work_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heads, _ = make()
    engine = RowEngine(MIXES["mix"], Uniform(), 4)
    expected = engine(rows, heads).total.item()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    with torch.no_grad():
        result = engine(rows, heads)
    assert not result.total.requires_grad
    assert result.total.item() == pytest.approx(expected)
    frozen, heads, leaves = make()
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not engine(frozen, heads).total.requires_grad


def test_padding_rows_change_nothing() -> None:
    rows, heads, leaves = make()
    engine = RowEngine(MIXES["mix"], Decay(DecayOptions()), 6)
    before = engine(rows, heads, with_metrics=True)
    before.total.backward()

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.cat((tensor.detach(), tensor.new_full((4, *tensor.shape[1:]), value)))

    hidden = pad(rows.hidden, 0.0).requires_grad_()
    assert rows.target_index is not None
    padded = Rows(
        hidden=hidden, target_hidden=rows.target_hidden, target_index=pad(rows.target_index, 0),
        target_ids=pad(rows.target_ids, 0), weight=pad(rows.weight, 0.0), slot=pad(rows.slot, 0),
        block=pad(rows.block, BLOCKS),
        extras={name: pad(extra, 0.0) for name, extra in rows.extras.items()},
    )  # fmt: skip
    after = engine(padded, heads, with_metrics=True)
    after.total.backward()
    torch.testing.assert_close(after.total, before.total)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[:N], leaves["hidden"].grad)
    assert not hidden.grad[N:].any()
    assert after.metrics.keys() == before.metrics.keys()
    for name, pair in before.metrics.items():
        torch.testing.assert_close(after.metrics[name], pair, msg=name)


def test_zero_rows_give_zeros_that_backpropagate() -> None:
    source = torch.ones(3, H, requires_grad=True)
    after = torch.ones(V, R, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    rows = Rows(
        hidden=source[:0] * 2, correction=torch.zeros(0, R), target_hidden=torch.zeros(0, H), target_index=nothing,
        target_ids=nothing, weight=torch.zeros(0), slot=nothing, block=nothing,
    )  # fmt: skip
    head = torch.ones(V, H)
    result = RowEngine(MIXES["mix"], Uniform())(
        rows, Heads(draft=head, target=head, correction=after), with_metrics=True
    )
    result.total.backward()
    assert result.total.item() == 0.0
    assert result.denominator.item() == 0.0
    assert source.grad is not None
    assert not source.grad.any()
    assert after.grad is not None
    assert not after.grad.any()


def test_the_rows_own_denominator_stands() -> None:
    rows, heads, _ = make()
    rows = Rows(**{name: getattr(rows, name) for name in Rows.__slots__ if name not in ("denominator", "__weakref__")},
                denominator=torch.tensor(17.0))  # fmt: skip
    result = RowEngine(MIXES["ce"], Uniform())(rows, heads)
    assert result.denominator.item() == 17.0
    assert result.metrics["loss"][1].item() == 17.0


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize(("chunk_rows", "most_rows"), [(3, 3), (8, 6), (1000, N)])
def test_logits_of_one_chunk_exist_at_a_time(chunk_rows: int, most_rows: int) -> None:
    rows, heads, _ = make(correction=True)
    with Largest() as largest:
        RowEngine(MIXES["mix"], Uniform(), chunk_rows)(rows, heads, with_metrics=True).total.backward()
    # Not fewer either: the recorder sees inside the engine.
    assert largest.elements == max(most_rows * V, N * H)


def test_target_logits_are_formed_once_per_position() -> None:
    rows, heads, _ = make()
    shapes: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if "mm" in function.__name__:
                shapes.append(tuple(made.shape))
            return made

    with Products(), torch.no_grad():
        RowEngine(MIXES["tv"], Uniform())(rows, heads)
    assert rows.target_index is not None
    assert shapes == [(N, V), (rows.target_index.unique().numel(), V)]


@pytest.mark.parametrize(
    ("blocks", "chunk", "expected"),
    [
        ([], 4, []),
        ([0, 0, 0, 1, 1, 2], 6, [(0, 6)]),
        ([0, 0, 0, 1, 1, 2], 5, [(0, 5), (5, 6)]),
        ([0, 0, 0, 1, 1, 2], 3, [(0, 3), (3, 6)]),
        ([0, 0, 0, 1, 1, 2], 1, [(0, 3), (3, 5), (5, 6)]),
        ([4, 4, 9, 9, 9, 9], 3, [(0, 2), (2, 6)]),
    ],
)
def test_chunks_hold_whole_blocks(blocks: list[int], chunk: int, expected: list[tuple[int, int]]) -> None:
    assert list(chunk_spans(torch.tensor(blocks), chunk)) == expected


def test_a_term_that_reads_what_is_not_there() -> None:
    rows, heads, _ = make()
    fields = {"hidden", "target_ids", "weight", "slot", "block"}
    bare = Rows(**{name: getattr(rows, name) for name in fields})
    with pytest.raises(ConfigError, match="no target features"):
        RowEngine(MIXES["tv"], Uniform())(bare, heads)
    with pytest.raises(ConfigError, match=r"(?s)terms\.confidence.*confidence_logits"):
        RowEngine({"confidence": (Confidence(), 1.0)}, Uniform())(
            Rows(**{name: getattr(rows, name) for name in (*fields, "target_hidden", "target_index")}), heads
        )


def test_metrics_by_hand() -> None:
    """Two blocks of two slots, V = 2, where every figure can be counted on fingers."""
    # Draft logits (0, l): acceptance of a target (0.5, 0.5) is 1 - |sigmoid(l) - 0.5|.
    logit = torch.tensor([0.0, 2.0, -2.0, 0.0])
    head = torch.tensor([[0.0], [1.0]])
    rows = Rows(
        hidden=logit[:, None], target_hidden=torch.zeros(1, 1), target_index=torch.zeros(4, dtype=torch.int64),
        target_ids=torch.tensor([0, 1, 1, 0]), weight=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        slot=torch.tensor([0, 1, 0, 1]), block=torch.tensor([5, 5, 6, 6]),
    )  # fmt: skip
    engine = RowEngine(MIXES["ce"], Uniform())
    result = engine(rows, Heads(draft=head, target=head), with_metrics=True)
    metrics = {name: (above.item(), below.item()) for name, (above, below) in result.metrics.items()}
    off = abs(torch.sigmoid(torch.tensor(2.0)).item() - 0.5)
    ce = [torch.tensor(2.0).log().item(), torch.log1p(torch.exp(torch.tensor(-2.0))).item()]
    expected = ce[0] + ce[1] + ce[1] + 2.0
    assert metrics == {
        "loss": pytest.approx((expected, 3.0)),
        "loss/ce": pytest.approx((expected, 3.0)),
        "accuracy@0": (1.0, 2.0),  # argmax of equal logits is 0, the label; of (0, -2) is 0, not the label
        "accuracy@1": (1.0, 1.0),
        "tau_greedy": (1 + 1 + 1 + 1, 2.0),
        "accept_rate@0": pytest.approx((1.0 + 1.0 - off, 2.0)),
        "accept_rate@1": pytest.approx((1.0 - off, 1.0)),
        "tau_probabilistic": pytest.approx((1 + 1 + (1 - off) + 1 + (1 - off), 2.0)),
    }
    assert set(engine(rows, Heads(draft=head, target=head)).metrics) == {"loss", "loss/ce"}
