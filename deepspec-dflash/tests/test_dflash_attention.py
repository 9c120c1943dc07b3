"""The three attention paths give one answer, forward and backward, and it is the one a plain loop gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import deepspec_dflash.attention as attention_module
from deepspec_dflash.attention import BlockLayout, KeysValues, Path, attend, choose

BLOCK, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
ANCHORS = [[0, 1, 5, 129], [140], [64, 128, 129]]  # no context at all, block edges of the flex mask, ragged
WINDOWS = [None, BLOCK, 64]


def _layout(
    anchors: list[list[int]],
    block_size: int = BLOCK,
    device: torch.device | str = "cpu",
    window: int | None = None,
) -> BlockLayout:
    width = max(map(len, anchors))
    grid, grid_anchors = torch.zeros(2, len(anchors), width, dtype=torch.long)
    place, block = [], 0
    for row, of_sequence in enumerate(anchors):
        for column, anchor in enumerate(of_sequence):
            grid[row, column], grid_anchors[row, column] = block, anchor
            place.append(row * width + column)
            block += 1
    return BlockLayout(
        grid_BA=grid.to(device),
        grid_anchors_BA=grid_anchors.to(device),
        place_N=torch.tensor(place, device=device),
        block_size=block_size,
        window=window,
    )


def _inputs(num_tokens: int = 141, anchors: list[list[int]] = ANCHORS) -> list[Tensor]:
    torch.manual_seed(0)
    blocks, sequences = sum(map(len, anchors)), len(anchors)
    shapes = [
        (blocks, HEADS, BLOCK, HEAD_DIM),
        (sequences, KV_HEADS, num_tokens, HEAD_DIM),
        (sequences, KV_HEADS, num_tokens, HEAD_DIM),
        (blocks, KV_HEADS, BLOCK, HEAD_DIM),
        (blocks, KV_HEADS, BLOCK, HEAD_DIM),
    ]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def _plain(inputs: list[Tensor], anchors: list[list[int]], scale: float, window: int | None = None) -> Tensor:
    """Slot by slot: the context from its window's first position to its block's anchor, and its block."""
    queries, context_keys, context_values, keys, values = inputs
    out, block = [], 0
    for sequence, of_sequence in enumerate(anchors):
        for anchor in of_sequence:
            for slot in range(BLOCK):
                first = 0 if window is None else max(0, anchor + slot - window + 1)
                k = torch.cat([context_keys[sequence, :, first:anchor], keys[block]], 1)
                v = torch.cat([context_values[sequence, :, first:anchor], values[block]], 1)
                k, v = k.repeat_interleave(HEADS // KV_HEADS, 0), v.repeat_interleave(HEADS // KV_HEADS, 0)
                out.append((scale * queries[block, :, slot, None] @ k.transpose(-1, -2)).softmax(-1) @ v)
            block += 1
    return torch.cat(out, dim=1).unflatten(1, (-1, BLOCK)).transpose(0, 1)


def _attend(inputs: list[Tensor], path: Path | None, layout: BlockLayout, scale: float) -> Tensor:
    queries, context_keys, context_values, keys, values = inputs
    context: KeysValues = (context_keys, context_values)
    return attend(queries, context, (keys, values), layout, scale=scale, path=path)


def _compare_with_plain(inputs: list[Tensor], path: Path | None, tolerance: float, window: int | None) -> None:
    scale, layout = 0.37, _layout(ANCHORS, device=inputs[0].device, window=window)
    expected = _plain(inputs, ANCHORS, scale, window)
    gradient = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, gradient)
    found = _attend(inputs, path, layout, scale)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for found_grad, expected_grad in zip(torch.autograd.grad(found, inputs, gradient), expected_grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("chunk_elements", [1 << 24, 5000])
@pytest.mark.parametrize("path", ["split", "dense", None])
def test_paths_agree_with_a_plain_loop(
    path: Path | None, chunk_elements: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "_CHUNK_ELEMENTS_CPU", chunk_elements)
    _compare_with_plain(_inputs(), path, 1e-5, window)


def test_a_chunk_whose_queries_see_no_context() -> None:
    """With the sizes that are in use: the first chunk of a long sequence has the block at its first token alone."""
    heads, tokens, anchors = 8, 9000, torch.arange(300) * 20
    layout = _layout([anchors.tolist()])
    torch.manual_seed(0)
    shapes = [(300, heads, BLOCK, 16), *[(1, 1, tokens, 16)] * 2, *[(300, 1, BLOCK, 16)] * 2]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    found, expected = (_attend(inputs, path, layout, 0.25) for path in ("split", "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    toward = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, inputs, toward)
    for gradient, reference in zip(torch.autograd.grad(found, inputs, toward), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_a_plain_loop(window: int | None) -> None:
    with torch.no_grad():  # on CPU flex_attention has no backward
        inputs = [tensor.detach() for tensor in _inputs()]
        found = _attend(inputs, "flex", _layout(ANCHORS, window=window), 0.37)
        torch.testing.assert_close(found, _plain(inputs, ANCHORS, 0.37, window), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("path", ["split", "dense", "flex"])
def test_paths_agree_on_a_gpu(path: Path, window: int | None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    _compare_with_plain([tensor.detach().cuda().requires_grad_() for tensor in _inputs()], path, 1e-3, window)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("path", ["split", "dense", "flex"])
def test_what_a_block_may_not_see_does_not_matter(path: Path) -> None:
    inputs, layout = [tensor.detach() for tensor in _inputs()], _layout(ANCHORS)
    before = _attend(inputs, path, layout, 0.25)
    inputs[1][0, :, 5:] = 1e4  # the third block of the first sequence is anchored at 5
    inputs[3][3] = 1e4  # the fourth block's own keys
    after = _attend(inputs, path, layout, 0.25)
    unchanged = [0, 1, 2, *range(4, len(before))]
    torch.testing.assert_close(before[unchanged], after[unchanged], rtol=0, atol=1e-6)
    assert (before[3] - after[3]).abs().max() > 1.0


def test_log_sum_exp_has_a_gradient() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    layout = BlockLayout.one_each(torch.zeros(1, dtype=torch.long), 3)
    layout.__dict__["limits_BQ"] = torch.tensor([[5, 2, 0]])

    def merged(*parts: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_module._split(parts[0], (parts[1], parts[2]), layout, 0.5)
        return out, lse.exp()

    # Scores are formed in fp32, so the numerical gradient is only as fine as that.
    assert torch.autograd.gradcheck(merged, (q, k, v), eps=1e-2, atol=2e-3, rtol=1e-2)
    assert merged(q, k, v)[1][0, 0, 2] == 0.0
    assert math.isinf(attention_module._split(q, (k, v), layout, 0.5)[1][0, 0, 2].item())


def test_flex_mask_covers_exactly_what_is_seen() -> None:
    layout = _layout([[0, 100, 200, 300], [290]], block_size=64)
    mask = layout.flex_mask(310)
    partial, full = mask.kv_num_blocks[:, 0].tolist(), mask.full_kv_num_blocks[:, 0].tolist()
    # Query blocks of 128 hold two blocks each: anchors (0, 100) and (200, 300), key blocks of 128 tokens.
    assert partial[0] == [1, 2]
    assert full[0] == [0, 1]
    assert partial[1] == [3, 0]
    assert full[1] == [0, 0]
    assert layout.flex_mask(310) is mask


def test_a_windows_flex_mask_leaves_out_what_lies_before_it() -> None:
    mask = _layout([[600, 660]], block_size=64, window=400).flex_mask(700)
    # Slots at 600 to 663 and at 660 to 723 see from 201 and from 261 on, up to their anchors: 201 to 659 in all, of key
    # blocks 1 to 5. All of them see 324 to 599, and so the whole of key block 3.
    assert mask.kv_num_blocks[0, 0].tolist() == [4]
    assert mask.kv_indices[0, 0, 0, :4].tolist() == [1, 2, 4, 5]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [1]
    assert mask.full_kv_indices[0, 0, 0, 0] == 3


def test_autocast_multiplies_in_its_type() -> None:
    inputs, layout = _inputs(), _layout(ANCHORS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = _attend(inputs, None, layout, 0.25)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), _attend(inputs, None, layout, 0.25), rtol=0.05, atol=0.05)


def test_the_path_follows_device_and_size() -> None:
    queries, layout = torch.zeros(1, HEADS, BLOCK, HEAD_DIM), _layout(ANCHORS)
    assert choose(queries, layout, 141) == "dense"
    assert choose(queries, layout, 1 << 26) == "split"
    assert choose(queries.to("meta"), layout, 141) == "split"
