"""How the row engine cuts rows into chunks: what exists at a time, what is formed how often, what must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine, RowResult
from deepspec_core.rows.large_buffer import large_buffer
from deepspec_core.rows.plan import chunk_spans, plan_rows
from deepspec_core.rows.terms import Confidence, CrossEntropy, TotalVariation
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay

K, H, V, R = 4, 3, 64, 2
KERNELS = ["plain", "eager"]


def engine(chunk_rows: int | None = None, kernels: str = "eager") -> RowEngine:
    terms = {"ce": (CrossEntropy(), 0.1), "tv": (TotalVariation(), 0.9), "confidence": (Confidence(), 1.0)}
    return RowEngine(terms, Decay(DecayOptions()), chunk_rows, kernels=kernels)


def make(anchors: list[int], *, leaves: bool = True) -> tuple[Rows, Heads]:
    """Blocks of up to K rows at `anchors` of one sequence, the way anchored drafts make them; every third is cut."""
    generator = torch.Generator().manual_seed(3)
    slots = [slot for number, _ in enumerate(anchors) for slot in range(K - number % 3)]
    blocks = [number for number, _ in enumerate(anchors) for _ in range(K - number % 3)]
    positions = torch.tensor([anchors[block] + slot for block, slot in zip(blocks, slots, strict=True)])
    distinct, index = positions.unique(return_inverse=True)
    count = len(slots)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = Rows(
        hidden=normal(count, H).requires_grad_(leaves),
        correction=normal(count, R).requires_grad_(leaves),
        target_hidden=normal(len(distinct), H),
        target_index=index,
        target_ids=torch.randint(0, V, (count,), generator=generator),
        weight=torch.ones(count),
        slot=torch.tensor(slots),
        block=torch.tensor(blocks),
        extras={"confidence_logits": normal(count).requires_grad_(leaves)},
    )
    head = normal(V, H)
    return rows, Heads(draft=head, target=head, correction=normal(V, R).requires_grad_(leaves), softcap=5.0)


ANCHORS = [0, 1, 2, 5, 6, 9, 10, 11, 15, 16, 17, 18]


def gradients(result: RowResult, rows: Rows, heads: Heads) -> list[Tensor]:
    assert rows.correction is not None
    assert heads.correction is not None
    leaves = [rows.hidden, rows.correction, rows.extras["confidence_logits"], heads.correction]
    return list(torch.autograd.grad(result.total, leaves))


def select(rows: Rows, order: Tensor) -> Rows:
    """Some rows, in another order; blocks are numbered anew."""
    assert rows.correction is not None
    assert rows.target_index is not None
    assert rows.target_ids is not None
    _, block = torch.unique_consecutive(rows.block[order], return_inverse=True)
    return evolve(
        rows, hidden=rows.hidden[order], correction=rows.correction[order], target_index=rows.target_index[order],
        target_ids=rows.target_ids[order], weight=rows.weight[order], slot=rows.slot[order], block=block,
        extras={name: extra[order] for name, extra in rows.extras.items()},
    )  # fmt: skip


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 11, None])
def test_each_product_is_done_once(chunk_rows: int | None, kernels: str) -> None:
    rows, heads = make(ANCHORS)
    assert rows.target_hidden is not None
    counter = FlopCounterMode(display=False)
    with counter:
        engine(chunk_rows, kernels)(rows, heads).total.backward()
    count, positions = len(rows.slot), len(rows.target_hidden)
    forward = count * H * V + positions * H * V + count * R * V
    backward = (
        count * V * H + count * V * R + V * count * R
    )  # hidden, correction, correction head; none of a frozen head
    assert counter.get_total_flops() == 2 * (forward + backward)
    with torch.no_grad(), counter:
        engine(chunk_rows, kernels)(rows, heads, with_metrics=True)
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("labelled", [True, False])
def test_a_footprint_counts_the_products_that_are_done(labelled: bool) -> None:
    """Without labels the target's own argmax is one, whatever the terms read."""
    rows, heads = make(ANCHORS)
    rows = rows if labelled else evolve(rows, target_ids=None)
    over = RowEngine({"ce": (CrossEntropy(), 1.0)}, Decay(DecayOptions()))
    counter = FlopCounterMode(display=False)
    with counter:
        over(evolve(rows, extras={}), heads).total.backward()
    assert over.footprint(rows, heads, dtype=torch.float32, device_type="cpu").flops == counter.get_total_flops()


@pytest.mark.parametrize("chunk_rows", [1, 5, 11, None])
def test_a_head_that_is_trained_costs_one_product_more(chunk_rows: int | None) -> None:
    rows, heads = make(ANCHORS)
    trained = evolve(heads, draft=heads.draft.clone().requires_grad_())
    count, counter = len(rows.slot), FlopCounterMode(display=False)
    with counter:
        engine(chunk_rows)(rows, heads).total.backward()
    before = counter.get_total_flops()
    with counter:
        engine(chunk_rows)(rows, trained).total.backward()
    assert counter.get_total_flops() - before == 2 * count * H * V


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (3, 1 << 20)])
def test_large_buffers_are_tensors_like_others(shape: tuple[int, int], dtype: torch.dtype) -> None:
    buffer = large_buffer(*shape, dtype=dtype, device=torch.device("cpu"))
    assert (buffer.shape, buffer.dtype) == (shape, dtype)
    assert buffer.is_contiguous()
    values = torch.randn(shape).to(dtype)
    buffer[:2] = values[:2]
    assert torch.equal(buffer[:2].clone(), values[:2])


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("chunk_rows", "most_rows", "window"), [(4, 4, 4), (8, 7, 7), (1000, 36, 18)])
@pytest.mark.parametrize("one_head", [True, False])
def test_logits_of_one_chunk_exist_at_a_time(
    chunk_rows: int, most_rows: int, window: int, one_head: bool, kernels: str
) -> None:
    """Draft's and target's in one tensor where they come of one head."""
    rows, heads = make(ANCHORS)
    if not one_head:
        heads = evolve(heads, target=heads.target.clone())
    with Largest() as largest:
        engine(chunk_rows, kernels)(rows, heads, with_metrics=True).total.backward()
    # Not fewer either: the recorder sees inside the engine.
    assert largest.elements == (most_rows + window * one_head) * V > max(len(rows.slot), V) * H


@pytest.mark.parametrize(
    ("blocks", "chunk", "expected"),
    [
        ([], 4, []),
        ([0, 0, 0, 1, 1, 2], 6, [(0, 6)]),
        ([0, 0, 0, 1, 1, 2], 5, [(0, 5), (5, 6)]),
        ([0, 0, 0, 1, 1, 2], 3, [(0, 3), (3, 6)]),
        ([0, 0, 0, 1, 1, 2], 1, [(0, 3), (3, 5), (5, 6)]),
        ([4, 4, 9, 9, 9, 9], 3, [(0, 2), (2, 6)]),
        ([*range(10)], 6, [(0, 5), (5, 10)]),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 8, [(0, 6), (6, 10)]),
    ],
)
def test_chunks_hold_whole_blocks(blocks: list[int], chunk: int, expected: list[tuple[int, int]]) -> None:
    assert list(chunk_spans(torch.tensor(blocks), chunk)) == expected


@pytest.mark.parametrize(("most_kept", "formed"), [(0, 8), (2, 6), (3, 5), (100, 5)])
def test_windows_keep_what_is_needed_again_as_far_as_there_is_room(most_kept: int, formed: int) -> None:
    block, index = torch.arange(8), torch.tensor([0, 1, 2, 3, 0, 4, 1, 0])
    plan = plan_rows(block, index, chunk_rows=1, most_kept=most_kept)
    window: list[int] = []
    total = 0
    for chunk in plan.chunks:
        assert chunk.kept_U is not None
        assert chunk.fresh_U is not None
        assert chunk.window_row_N is not None
        window = [window[row] for row in chunk.kept_U.tolist()] + chunk.fresh_U.tolist()
        assert [window[row] for row in chunk.window_row_N.tolist()] == index[chunk.span].tolist()
        assert len(window) <= max(1, most_kept)
        total += len(chunk.fresh_U)
    assert total == formed
    assert plan.most_rows == 1


@pytest.mark.parametrize(
    ("rows_of_a_block", "index", "formed"),
    [
        (1, [5, 2, 9, 2, 5, 7], [[5], [2], [9], [], [], [7]]),  # a chunk's rows are all that is formed at a time
        (2, [0, 0, 1, 1, 4, 3], [[0, 1], [], [3, 4]]),
        (2, [0, 0, 1, 1, 1, 3], [[0, 1], [], [3]]),
        (3, [2, 2, 2, 0, 9, 0, 9, 7, 8], [[2, 0, 9], [], [7, 8]]),  # what is needed soonest; 7 and 8 have no room
        (3, [0, 1, 2, 2, 1, 3, 3, 4, 5], [[0, 1, 2], [3], [4, 5]]),
    ],
)
def test_positions_to_come_are_formed_with_those_that_must_be(
    rows_of_a_block: int, index: list[int], formed: list[list[int]]
) -> None:
    block = torch.arange(len(index)) // rows_of_a_block
    chunks = plan_rows(block, torch.tensor(index), chunk_rows=rows_of_a_block, most_kept=4).chunks
    assert [chunk.fresh_U.tolist() for chunk in chunks if chunk.fresh_U is not None] == formed


@pytest.mark.parametrize("seed", range(20))
def test_windows_hold_what_chunks_need(seed: int) -> None:
    """Whatever the order, however little room; in the order of positions each is formed once."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randint(0, 30, (60,), generator=generator).sort().values
    index = torch.randint(0, 25, (60,), generator=generator)
    chunk_rows, most_kept = torch.randint(1, 20, (2,), generator=generator).tolist()
    for ordered in (False, True):
        index = index.sort().values if ordered else index
        plan = plan_rows(block, index, chunk_rows=chunk_rows, most_kept=most_kept)
        window: list[int] = []
        formed: list[int] = []
        for chunk in plan.chunks:
            assert chunk.kept_U is not None
            assert chunk.fresh_U is not None
            assert chunk.window_row_N is not None
            assert chunk.kept_U.tolist() == sorted(chunk.kept_U.tolist())  # they are moved to the front in place
            window = [window[row] for row in chunk.kept_U.tolist()] + chunk.fresh_U.tolist()
            formed += chunk.fresh_U.tolist()
            assert len(window) == len(set(window)) <= min(plan.window_rows, max(plan.most_rows, most_kept))
            assert [window[row] for row in chunk.window_row_N.tolist()] == index[chunk.span].tolist()
    assert sorted(formed) == index.unique().tolist()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("chunk_rows", [3, 7, 19])
def test_chunk_size_does_not_matter(chunk_rows: int, kernels: str) -> None:
    rows, heads = make(ANCHORS)
    whole = engine(None, kernels)(rows, heads, with_metrics=True)
    cut = engine(chunk_rows, kernels)(rows, heads, with_metrics=True)
    torch.testing.assert_close(cut.total, whole.total, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradients(cut, rows, heads), gradients(whole, rows, heads), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(cut.metrics), dict(whole.metrics), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_order_of_blocks_does_not_matter(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    shuffled = torch.randperm(len(ANCHORS), generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.nonzero(rows.block == block)[:, 0] for block in shuffled])
    one, other = engine(7, kernels)(rows, heads), engine(7, kernels)(select(rows, order), heads)
    torch.testing.assert_close(other.total, one.total, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradients(other, rows, heads), gradients(one, rows, heads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_batches_may_be_split_between_blocks(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    whole = engine(7, kernels)(rows, heads)
    parts = [select(rows, torch.nonzero(mask)[:, 0]) for mask in (rows.block < 5, rows.block >= 5)]
    halves = [engine(7, kernels)(part, heads) for part in parts]
    torch.testing.assert_close(halves[0].total + halves[1].total, whole.total, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(halves[0].denominator + halves[1].denominator, whole.denominator, rtol=1e-5, atol=0.0)
    summed = [one + two for one, two in zip(*(gradients(half, rows, heads) for half in halves), strict=True)]
    torch.testing.assert_close(summed, gradients(whole, rows, heads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_padding_rows_change_nothing(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    before = engine(6, kernels)(rows, heads, with_metrics=True)

    def pad(tensor: Tensor, value: float) -> Tensor:
        return torch.cat((tensor, tensor.new_full((5, *tensor.shape[1:]), value)))

    assert rows.correction is not None
    assert rows.target_index is not None
    assert rows.target_ids is not None
    padded = evolve(
        rows, hidden=pad(rows.hidden, 0.0), correction=pad(rows.correction, 0.0),
        target_index=pad(rows.target_index, 0), target_ids=pad(rows.target_ids, 0), weight=pad(rows.weight, 0.0),
        slot=pad(rows.slot, 0), block=pad(rows.block, len(ANCHORS)),
        extras={name: pad(extra, 0.0) for name, extra in rows.extras.items()},
    )  # fmt: skip
    after = engine(6, kernels)(padded, heads, with_metrics=True)
    torch.testing.assert_close(after.total, before.total)
    torch.testing.assert_close(gradients(after, rows, heads), gradients(before, rows, heads))
    torch.testing.assert_close(dict(after.metrics), dict(before.metrics))


@pytest.mark.parametrize("kernels", KERNELS)
def test_zero_rows_give_zeros_that_backpropagate(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    nothing = select(rows, torch.zeros(0, dtype=torch.int64))
    result = engine(None, kernels)(nothing, heads, with_metrics=True)
    assert result.total.item() == result.denominator.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(result, rows, heads))


@pytest.mark.parametrize("kernels", KERNELS)
def test_one_row(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    first = select(rows, torch.tensor([0]))
    result = engine(None, kernels)(first, heads, with_metrics=True)
    alone = engine(None, "plain")(evolve(rows, weight=(torch.arange(len(rows.slot)) == 0).float()), heads)
    torch.testing.assert_close(result.total, alone.total)
    torch.testing.assert_close(gradients(result, rows, heads), gradients(alone, rows, heads))


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_that_all_weigh_nothing(kernels: str) -> None:
    rows, heads = make(ANCHORS)
    masked = evolve(rows, weight=torch.zeros_like(rows.weight))
    result = engine(None, kernels)(masked, heads, with_metrics=True)
    assert result.total.item() == result.denominator.item() == 0.0
    assert not any(gradient.any() for gradient in gradients(result, rows, heads))
    assert all(torch.isfinite(torch.stack(pair)).all() for pair in result.metrics.values())


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["hidden", "target_hidden"])
def test_features_that_are_not_finite_show_in_the_total(where: str, value: float, kernels: str) -> None:
    rows, heads = make(ANCHORS)
    broken = getattr(rows, where).detach().clone()
    broken[3, 2] = value
    capless = evolve(heads, softcap=None, target_softcap=None)
    result = engine(5, kernels)(evolve(rows, **{where: broken}), capless, with_metrics=True)
    assert not torch.isfinite(result.total)
