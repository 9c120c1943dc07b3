"""Copies of trained weights in the dtype of products: what they hold, whose their gradients are, what stays."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspec_core.layers.product_weights import ProductWeights
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.terms import CrossEntropy
from deepspec_core.rows.weightings import Uniform
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.step import TrainingStep

BF16 = torch.bfloat16


class Net(nn.Module):
    """An embedding, a matrix used twice, a norm and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.twice = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.norm, self.frozen = nn.LayerNorm(8), nn.Linear(8, 3).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            return self.frozen(self.norm(self.twice(self.twice(self.embedding(ids))))).float().square().sum()


def after(net: Net, batches: list[Tensor], weights: ProductWeights | None) -> dict[str, Any]:
    for ids in batches:
        if weights is None:
            net(ids).backward()
        else:
            with weights.in_place():
                loss = net(ids)
            loss.backward()
    return {name: value.grad for name, value in net.named_parameters()}


BATCHES = [torch.tensor([1, 5, 5, 39]), torch.tensor([[0, 5], [7, 7]])]


@pytest.mark.parametrize("alone", [True, False])
def test_gradients_are_those_of_autocast(alone: bool) -> None:
    plain, net = Net(), Net()
    expected = after(plain, BATCHES, None)
    found = after(net, BATCHES, ProductWeights(net, BF16, alone=alone))
    assert found["frozen.weight"] is None
    for name, gradient in expected.items():
        if gradient is not None:
            assert found[name].dtype == torch.float32
            # The same roundings to bf16; sums of repeated rows in another order.
            torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alone", [True, False])
def test_gradients_are_added_where_they_stand_only_when_alone(alone: bool) -> None:
    net = Net()
    weights = ProductWeights(net, BF16, alone=alone)
    after(net, BATCHES[:1], weights)
    seen: list[str] = []

    def see(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            seen.append(name)

    for name in ("twice.weight", "embedding.weight"):
        net.get_parameter(name).register_hook(partial(see, name))
    before = net.twice.weight.grad
    after(net, BATCHES[1:], weights)
    assert net.twice.weight.grad is before
    # Data parallelism hears of gradients through autograd.
    assert sorted(seen) == ([] if alone else ["embedding.weight", "twice.weight"])


@pytest.mark.parametrize("follows", [True, False])
def test_copies_follow_the_weights_and_leave_the_module_as_it_was(follows: bool) -> None:
    net = Net()
    weights = ProductWeights(net, BF16, alone=True)
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], lr=0.1, fused=True)
    if follows:
        weights.follow(optimizer)
    for _ in range(3):
        with weights.in_place():
            assert net.twice.weight.dtype == BF16
            assert torch.equal(net.twice.weight, parameters["twice.weight"].to(BF16))
            assert net.frozen.weight is parameters["frozen.weight"]
            net(BATCHES[0]).backward()
        assert dict(net.named_parameters()) == parameters
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        net.twice.weight.fill_(3.0)  # as a checkpoint that is read
    with weights.in_place():
        assert bool((net.twice.weight == 3.0).all())
    with pytest.raises(ZeroDivisionError), weights.in_place():
        raise ZeroDivisionError
    assert net.twice.weight is parameters["twice.weight"]
    assert "forward" not in vars(net.embedding)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_micro_batches_of_a_step_add_up_to_the_same_alone_or_not(dtype: torch.dtype) -> None:
    source, found = TinySource(6), []
    for alone in (True, False):
        torch.manual_seed(1)
        draft = TinyDraft().train()
        step = TrainingStep(
            draft, RowEngine({"ce": (CrossEntropy(), 1.0)}, Uniform()), compute_dtype=dtype, alone=alone
        )
        micro = MicroBatches(source, draft.preparation, seed=0)
        for indices in ((0, 1), (2,), (1, 3)):
            step(micro[Plan(epoch=0, indices=indices)].to_draft_batch(source, torch.device("cpu"))).total.backward()
        found.append({name: value.grad for name, value in draft.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-6, atol=1e-6)
