"""A training step with compiled layers against the same step as it is, for every algorithm with recorded vectors.

In fp32 gradients differ by rounding. In bf16 compiled passes keep intermediate values in fp32 where eager ones round each
of them, and a gradient of a few entries may differ by a tenth. So there all gradients together are held against fp32: a
compiled step is at most a quarter further from it than an eager one.
Other lengths, batches and numbers of blocks must not compile anything anew.
"""

from collections.abc import Sequence

import pytest
import torch
from torch._dynamo.utils import counters

from deepspec_core.config.loss_options import LossOptions
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.rows.kernels.formulas import why_not_compiled
from deepspec_core.testing.random_batches import TAPS, padded_batch, prepare, random_sample, with_large_weights
from deepspec_core.testing.tiny_family import tiny_adapter
from deepspec_core.training.compiled_layers import CompiledLayers
from deepspec_core.training.step import TrainingStep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not_compiled() is not None, reason=str(why_not_compiled())),
]
LOSSES = {"dflash": {"ce": 1.0}, "dspark": {"ce": 0.1, "tv": 0.9, "confidence": 1.0}, "eagle3": {"soft_ce": 1.0}}
# Lengths of the sequences of a batch, and which of them share a row.
SHAPES: list[tuple[Sequence[int], Sequence[Sequence[int]] | None]] = [
    ((24,), None),
    ((17, 31), None),
    ((40, 9, 13), None),
    ((12, 20, 9), ((0, 1), (2,))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", list(LOSSES))
def test_compiled_layers_change_rounding_only_and_are_compiled_once(
    algorithm: str, dtype: torch.dtype, registry: Registry
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    spec = registry.get("draft", algorithm)
    options = spec.options(mask_token_id=63) if algorithm != "eagle3" else spec.options()
    draft = with_large_weights(registry.load("draft", algorithm)(options, tiny_adapter(), TAPS)).train()
    engine = build_engine(LossOptions(terms=LOSSES[algorithm], kernels="plain"), registry)
    exact = TrainingStep(draft, engine)
    steps = [
        TrainingStep(draft, engine, compute_dtype=dtype, compiled=compiled, alone=True) for compiled in (False, True)
    ]
    compiled_graphs: list[int] = []
    for number, (lengths, rows) in enumerate(SHAPES * 2):
        samples = [random_sample(str(place), length, seed=number) for place, length in enumerate(lengths)]
        batch = padded_batch(draft, prepare(draft, samples), rows=rows)
        expected, plain, fast = (gradients(step, draft, batch) for step in (exact, *steps))
        assert expected.keys() == plain.keys() == fast.keys()
        off_plain, off_fast = (
            {
                name: float((found[name] - value).norm() / value.norm().clamp(min=1e-6))
                for name, value in expected.items()
            }
            for found in (plain, fast)
        )
        assert sum(off_fast.values()) <= 1.25 * sum(off_plain.values()) + 1e-5 * len(off_fast), lengths
        if dtype == torch.float32:
            assert max(off_fast.values()) <= 1e-5, lengths
        compiled_graphs.append(counters["stats"]["unique_graphs"])
    assert compiled_graphs[0] > 0
    assert compiled_graphs == compiled_graphs[:1] * len(compiled_graphs)


def gradients(step: TrainingStep, draft: DraftModel, batch: object) -> dict[str, torch.Tensor]:
    draft.zero_grad(set_to_none=True)
    result = step(batch)
    result.total.backward()
    found = {name: value.grad.clone() for name, value in draft.named_parameters() if value.grad is not None}
    return {**found, "total": result.total.detach()}


def test_what_cannot_be_compiled_runs_as_it_is_and_is_said() -> None:
    adapter = tiny_adapter()
    from deepspec_core.layers.decoder_layer import DraftLayer

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x * 2

    layer = DraftLayer(adapter)
    layer.mlp = Odd()
    hidden = torch.randn(5, 32)
    layers = CompiledLayers(layer)
    with layers.in_place():
        compiled = layer.finish(hidden, hidden)
    torch.testing.assert_close(compiled, layer.finish(hidden, hidden))
    assert "finish" not in vars(layer)
