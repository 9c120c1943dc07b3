"""The attention over steps: equal to a dense softmax over all steps' keys, without ever forming its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec_core.contracts.draft import DraftBatch
from deepspec_core.testing.draft_checks import trained
from deepspec_core.testing.random_batches import padded_batch, prepare, random_sample
from deepspec_eagle3 import attention
from deepspec_eagle3.attention import KeysValues, Path, StepLayout, attend_first, attend_later, choose
from deepspec_eagle3.model import Eagle3Model

B, T, HEADS, GROUPS, D, SCALE = 2, 13, 4, 2, 16, 0.3
PLACES = torch.tensor([1, 2, 3, 7, 11, 12, 13, 20, 25])  # of B * T
DOCUMENTS = torch.tensor([[0] * 5 + [5] * 7 + [12], [0] * 13])


def tensors(steps: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, list[KeysValues]]:
    generator = torch.Generator().manual_seed(seed)

    def new(heads: int) -> Tensor:
        # Laid out as projections leave them: heads inside tokens.
        return torch.randn(B, T, heads, D, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()

    return new(HEADS), [(new(GROUPS), new(GROUPS)) for _ in range(steps)]


def dense(
    queries: Tensor, steps: list[KeysValues], first: Tensor | None, scale: float, window: int | None = None
) -> Tensor:
    """softmax over [T, S * T] scores, masked from the definition."""
    repeat = queries.shape[1] // steps[0][0].shape[1]
    keys = torch.cat([k for k, _ in steps], dim=2).repeat_interleave(repeat, dim=1)
    values = torch.cat([v for _, v in steps], dim=2).repeat_interleave(repeat, dim=1)
    tokens = queries.shape[2]
    index = torch.arange(tokens)
    causal = (index <= index[:, None]).expand(len(queries), -1, -1)
    if first is not None:
        causal = causal & (index >= first[:, :, None])
    if window is not None:  # the query of step s at index q stands at position q + s
        causal = causal & (index[:, None] + len(steps) - 1 - index < window)
    same = torch.eye(tokens, dtype=torch.bool).expand(len(queries), -1, -1)
    visible = torch.cat([causal, *[same] * (len(steps) - 1)], dim=2)[:, None]
    scores = (queries @ keys.mT * scale).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ values


def at_places(x: Tensor, places: Tensor = PLACES) -> Tensor:
    """[B, heads, T, D] -> [heads, N, D]."""
    return x.transpose(1, 2).flatten(0, 1)[places].transpose(0, 1)


def ours(
    queries: Tensor, steps: list[KeysValues], layout: StepLayout, *, scale: float = SCALE, path: Path | None = None
) -> Tensor:
    """The same at PLACES, [heads, N, D]."""
    if len(steps) == 1:
        return at_places(attend_first(queries, steps[0], layout, scale=scale, path=path)[0])
    later = [(at_places(keys), at_places(values)) for keys, values in steps[1:]]
    return attend_later(at_places(queries), steps[0], later, PLACES, layout, scale=scale, path=path)


@pytest.mark.parametrize("window", [None, 5, 9])
@pytest.mark.parametrize("first", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3 * B * HEADS * T, 1 << 20], ids=["one", "three", "all"])
def test_equals_a_dense_softmax(
    first: Tensor | None, steps: int, chunk: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_CHUNK_ELEMENTS_CPU", chunk)
    queries, held = tensors(steps)
    leaves = [queries, *(tensor for pair in held for tensor in pair)]
    expected = at_places(dense(queries, held, first, SCALE, window))
    found = ours(queries, held, StepLayout(first, window))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # scores are fp32
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
    wanted = torch.autograd.grad(expected, leaves, toward)
    for gradient, reference in zip(torch.autograd.grad(found, leaves, toward), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("first", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("places", [[14, 20, 21, 25], [0], [12, 13]], ids=["second", "one", "at the seam"])
def test_later_steps_attend_at_their_places_only(
    places: list[int], first: Tensor | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence may have none. No scores of other places are formed."""
    places_N = torch.tensor(places)
    queries, held = tensors(3)
    leaves = [queries, *(tensor for pair in held for tensor in pair)]
    expected = at_places(dense(queries, held, first, SCALE, window), places_N)
    later = [(at_places(keys, places_N), at_places(values, places_N)) for keys, values in held[1:]]
    formed: list[int] = []
    scores = attention._scores
    monkeypatch.setattr(attention, "_scores", lambda *args: formed.append((one := scores(*args)).shape[-2]) or one)
    layout = StepLayout(first, window)
    found = attend_later(at_places(queries, places_N), held[0], later, places_N, layout, scale=SCALE)
    most = max(sum(place // T == row for place in places) for row in range(B))
    assert formed == [HEADS // GROUPS * most]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
    wanted = torch.autograd.grad(expected, leaves, toward)
    for gradient, reference in zip(torch.autograd.grad(found, leaves, toward), wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("first", [None, [0] * 100 + [100] * 180 + [280] * 320], ids=["whole", "documents"])
def test_the_flex_mask_lists_the_blocks_that_are_seen(first: list[int] | None, window: int | None) -> None:
    """Those that evaluating every pair finds, though no pair is evaluated."""
    tokens = 600
    first_1T = None if first is None else torch.tensor([first])
    mask = StepLayout(first_1T, window).flex_mask(tokens, torch.device("cpu"))
    index_T = torch.arange(tokens)
    seen = index_T <= index_T[:, None]
    seen &= index_T >= (0 if first_1T is None else first_1T[0][:, None])
    seen &= index_T > (index_T[:, None] - window if window is not None else -1)
    blocks = torch.zeros(640, 640, dtype=torch.bool)
    blocks[:tokens, :tokens] = seen
    by_block = blocks.view(5, 128, 5, 128).transpose(1, 2)
    rows = (torch.arange(640).view(5, 128) < tokens)[:, None, :, None]
    listed, full = ([set(), set(), set(), set(), set()] for _ in range(2))
    for found, counts, indices in (
        (listed, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(5):
            found[row] |= set(indices[0, 0, row, : int(counts[0, 0, row])].tolist())
    for row in range(5):
        some = {key for key in range(5) if by_block[row, key].any()}
        whole = {key for key in range(5) if (by_block[row, key] | ~rows[row, 0]).all()}
        assert not listed[row] & full[row]
        assert some <= listed[row] | full[row] <= set(range(min(some), max(some) + 1))
        assert full[row] <= whole
        assert first is not None or full[row] == whole


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("first", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_has_the_same_numbers(first: Tensor | None, window: int | None) -> None:
    """On CPU flex_attention has no backward; its forward and log-sum-exp are what is ours to get right."""
    queries, held = tensors(3, torch.float32)
    queries, held = queries.detach(), [(keys.detach(), values.detach()) for keys, values in held]
    with torch.no_grad():
        found, expected = (ours(queries, held, StepLayout(first, window), path=path) for path in ("flex", "chunked"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_gradients_on_cuda(packed: bool, window: int | None) -> None:
    torch.manual_seed(0)
    first = torch.tensor([[0] * 300 + [300] * 212]).cuda() if packed else None
    leaves = [torch.randn(1, heads, 512, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
    leaves += [torch.randn(heads, 70, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2)]
    places = torch.arange(0, 490, 7, device="cuda")

    def run(path: Path) -> tuple[Tensor, ...]:
        layout, (whole, keys, values, queries, *own) = StepLayout(first, window), leaves
        out = attend_first(whole, (keys, values), layout, scale=0.1, path=path)[0].square().sum()
        later = attend_later(queries, (keys, values), [(own[0], own[1])], places, layout, scale=0.1, path=path)
        total = out + later.square().sum()
        return total, *torch.autograd.grad(total, leaves)

    assert choose(leaves[1]) == "flex"
    for found, expected in zip(run("flex"), run("chunked"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * expected.abs().max().item())


def test_large_scores_do_not_overflow() -> None:
    queries, held = tensors(3, torch.float32)
    scaled = [(keys * 200, values) for keys, values in held]
    found = ours(queries, scaled, StepLayout(), scale=1.0)
    assert found.isfinite().all()
    torch.testing.assert_close(found, at_places(dense(queries, scaled, None, 1.0)), rtol=0, atol=1e-4)


class Largest(TorchDispatchMode):
    """Records how many elements the largest tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def plain_outputs(model: Eagle3Model, batch: DraftBatch) -> Tensor:
    """All steps over all places from the definition, with dense scores: what the rows' hidden states are."""
    drafter, held = model.drafter, [[] for _ in model.drafter.draft_layers()]  # type: ignore[var-annotated]

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        held[layer].append((keys, values))
        return dense(queries, held[layer], None, drafter.draft_layers()[layer].attention.scale)

    hidden, states = drafter.project(batch.features.hidden), []
    index = torch.arange(batch.input_ids.shape[1])
    for step in range(model.options.ttt_length):
        ids = torch.zeros_like(batch.input_ids)
        ids[:, : -step - 1] = batch.input_ids[:, step + 1 :]
        hidden = drafter(hidden, model.embed_tokens(ids), drafter.rotary(hidden, index[None] + step), attend)
        states.append(hidden)
    prepared = batch.prepared
    rows: Tensor = drafter.norm(torch.stack(states)[prepared["step"], prepared["document"], prepared["index"]])
    return rows


@pytest.mark.parametrize("num_layers", [1, 2])
def test_no_scores_over_all_steps_exist(
    make_model: Callable[..., Eagle3Model],
    monkeypatch: pytest.MonkeyPatch,
    num_layers: int,
) -> None:
    """Forward and backward over 5 steps of 96 tokens make nothing as large as one head's [T, S * T] scores."""
    monkeypatch.setattr(attention, "_CHUNK_ELEMENTS_CPU", 1 << 13)
    tokens, steps = 96, 5
    model = make_model(ttt_length=steps, taps=(0, 3), num_layers=num_layers)
    batch = padded_batch(model, prepare(model, [random_sample("a", tokens, [0, 1] * 48, num_taps=2)]))
    parameters = list(trained(model).values())
    with Largest() as found:
        rows = model(batch).hidden
        gradients = torch.autograd.grad(model.logits(rows).logsumexp(-1).sum(), parameters)
    assert found.elements < tokens * steps * tokens
    assert found.elements >= 4 * 20 * 96, "attention of a chunk: the recorder sees inside"
    with Largest() as naive:
        expected = plain_outputs(model, batch)
        references = torch.autograd.grad(model.logits(expected).logsumexp(-1).sum(), parameters)
    assert naive.elements >= tokens * steps * tokens, "the recorder would notice"
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=2e-5 * reference.abs().max().item())
