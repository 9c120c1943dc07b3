"""Bytes alive and products counted: what is made, kept and let go, with and without numbers."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from deepspec_core.estimating.flops import flop_counter
from deepspec_core.estimating.memory import LiveBytes, bytes_of, fake_tensors


def test_a_storage_counts_once_from_its_making_until_its_last_view_is_gone() -> None:
    with LiveBytes() as live:
        tensor = torch.empty(1000)
        assert live.now == 4000
        view = tensor.view(10, 100)[3:].mT
        assert live.now == 4000
        del tensor
        assert live.now == 4000
        view.add_(1)
        del view
        assert (live.now, live.most) == (0, 4000)


def test_what_was_there_before_counts_nothing() -> None:
    weight = torch.ones(8, 8)
    with LiveBytes() as live:
        view = weight.mT
        assert live.now == 0
        kept = view @ weight
    assert live.now == 256
    del kept
    assert live.now == 0


def test_a_phase_has_its_own_peak_and_the_largest_of_several() -> None:
    phases: dict[str, int] = {}
    with LiveBytes(small=5000) as live:
        with live.phase("a", phases):
            kept = torch.empty(1000)
            torch.empty(2000)
        with live.phase("b", phases):
            torch.empty(10)
        with live.phase("a", phases):
            torch.empty(500)
    assert phases == {"a": 12_000, "b": 4040}
    assert live.most_small == 4000 + 2000
    assert bytes_of([kept, kept[:10], torch.empty(1)]) == 4004


@pytest.mark.parametrize("numbers", [True, False])
def test_what_autograd_keeps_is_alive_until_backward(numbers: bool) -> None:
    with nullcontext() if numbers else fake_tensors():
        layer, inputs = nn.Linear(64, 32, bias=False), torch.zeros(16, 64)
    with LiveBytes() as live:
        squared = layer(inputs).square().square()
        # The product and its square are needed for backward, the last square is held here.
        assert live.now == 3 * 16 * 32 * 4
        squared.sum().backward()
        del squared
        assert live.now == bytes_of([layer.weight]) == 64 * 32 * 4  # the gradient


def test_what_follows_from_real_tensors_may_be_read() -> None:
    with fake_tensors():
        weight = torch.empty(1 << 20, 1 << 20)  # 4 TiB, were it real
    index = torch.tensor([3, 1, 2])
    assert int(index.max()) == 3
    assert weight[index].shape == (3, 1 << 20)


@pytest.mark.parametrize("numbers", [True, False])
def test_products_are_counted_forward_and_backward(numbers: bool) -> None:
    with nullcontext() if numbers else fake_tensors():
        layer, inputs = nn.Linear(64, 32), torch.zeros(2, 16, 64)
    with flop_counter() as counter:
        outputs: Tensor = layer(inputs)
        assert counter.get_total_flops() == 2 * 32 * 64 * 32
        outputs.sum().backward()
    # No gradient of the inputs is asked for.
    assert counter.get_total_flops() == 2 * 2 * 32 * 64 * 32


@pytest.mark.parametrize("numbers", [True, False])
def test_attention_on_the_cpu_is_counted(numbers: bool) -> None:
    with nullcontext() if numbers else fake_tensors():
        queries = torch.zeros(2, 8, 20, 16, requires_grad=True)
        keys, values = (torch.zeros(2, 4, 30, 16, requires_grad=True) for _ in range(2))
    with flop_counter() as counter:
        attended = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=torch.ones(20, 30, dtype=torch.bool), enable_gqa=True
        )
        product = 2 * 2 * 8 * 20 * 30 * 16
        assert counter.get_total_flops() == 2 * product
        attended.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product
