"""Features and incremental decoding of transformers targets: equal to the model's own full forward, however cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepspec_core.contracts.target import TargetModel
from deepspec_core.errors import TargetError
from deepspec_core.families.grouped_attention import _attend
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_targets.qwen3 import Qwen3Adapter

PARITY = Path(__file__).parents[2] / "tests" / "parity"
TAPS = (-1, 0, 2, 3)
VOCAB = 61
EXACT: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}


def tiny(**changes: Any) -> TransformersTarget:
    torch.manual_seed(0)
    config = Qwen3Config(
        **{
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
            "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.1,
        }
        | changes
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    return TransformersTarget(model, Qwen3Adapter(config).architecture)


@pytest.fixture(params=["full", "sliding"])
def target(request: pytest.FixtureRequest) -> TransformersTarget:
    if request.param == "full":
        return tiny()
    return tiny(use_sliding_window=True, sliding_window=4, max_window_layers=2)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(target: TransformersTarget, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Taps [T, C], last hidden [T, H] and logits [T, V] of one unpadded sequence, by the model's own forward."""
    out = target.model(ids_T[None], output_hidden_states=True)
    taps = torch.cat([out.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    return taps[0], out.hidden_states[-1][0], out.logits[0]


def test_it_is_a_target_model(target: TransformersTarget) -> None:
    assert isinstance(target, TargetModel)
    assert not any(parameter.requires_grad for parameter in target.model.parameters())
    assert not target.model.training


def test_position_ids_are_honoured() -> None:
    target = tiny()
    ids, mask = tokens(1, 6), torch.ones(1, 6)
    stretched = target.features(ids, mask, torch.tensor([[0, 3, 6, 9, 12, 15]]), None, TAPS)
    plain = target.features(ids, mask, None, None, TAPS)
    shifted = target.features(ids, mask, torch.arange(6)[None] + 40, None, TAPS)
    torch.testing.assert_close(shifted.hidden, plain.hidden, rtol=1e-4, atol=1e-4)  # rotary is relative
    assert not torch.allclose(stretched.hidden[:, 1:], plain.hidden[:, 1:], atol=1e-2)


def test_left_padding_is_refused() -> None:
    with pytest.raises(RuntimeError, match="padded on the right"):
        tiny().features(tokens(1, 4), torch.tensor([[0, 1, 1, 1]]), None, None, TAPS)


def step(target: TransformersTarget, rows: dict[int, Tensor], start: dict[int, int], **options: Any) -> Any:
    """Feed rows to slots at their committed lengths, padded to the longest with -1."""
    width = max(len(row) for row in rows.values())
    ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
    for index, (slot, row) in enumerate(rows.items()):
        ids[index, : len(row)] = row
        positions[index, : len(row)] = torch.arange(len(row)) + start[slot]
    return target.decode(torch.tensor(list(rows)), ids, positions, TAPS, **options)


def test_uncommitted_tokens_leave_no_trace(target: TransformersTarget) -> None:
    right, wrong = tokens(16, seed=20), tokens(16, seed=21)
    hidden, _, logits = alone(target, right)
    target.open_slots(2, 32)
    step(target, {0: right[:6], 1: wrong[:10]}, {0: 0, 1: 0})
    target.commit(torch.tensor([0, 1]), torch.tensor([6, 10]))
    step(target, {0: torch.cat([right[6:8], wrong[:5]])}, {0: 6})
    target.commit(torch.tensor([0]), torch.tensor([8]))  # two of the seven stand
    step(target, {0: wrong[:4]}, {0: 8})  # none of these
    out = step(target, {0: right[8:]}, {0: 8})
    torch.testing.assert_close(out.hidden[0], hidden[8:], **EXACT)
    torch.testing.assert_close(out.logits[0], logits[8:], **EXACT)


def test_a_freed_slot_takes_the_next_sequence() -> None:
    target = tiny()
    first, second = tokens(20, seed=30), tokens(5, seed=31)
    target.open_slots(2, 32)
    step(target, {1: first}, {1: 0})
    target.commit(torch.tensor([1]), torch.tensor([20]))
    target.commit(torch.tensor([1]), torch.tensor([0]))
    out = step(target, {1: second}, {1: 0})
    torch.testing.assert_close(out.logits[0], alone(target, second)[2], **EXACT)


def test_decoding_to_the_last_position_and_no_further() -> None:
    target = tiny()
    sequence = tokens(9, seed=50)
    target.open_slots(1, 8)
    out = step(target, {0: sequence[:8]}, {0: 0})
    torch.testing.assert_close(out.logits[0], alone(target, sequence[:8])[2], **EXACT)
    target.commit(torch.tensor([0]), torch.tensor([8]))
    with pytest.raises(RuntimeError, match="max_length"):
        step(target, {0: sequence[8:]}, {0: 8})


@pytest.mark.parametrize(("slots", "first"), [([0, 1], 3), ([1, 0], 0)])
def test_wrong_positions_and_unordered_slots_are_refused(slots: list[int], first: int) -> None:
    target = tiny()
    target.open_slots(2, 16)
    with pytest.raises(RuntimeError, match="slots must ascend; positions go on"):
        target.decode(torch.tensor(slots), tokens(2, 1), torch.full((2, 1), first), TAPS)


def test_without_taps_features_are_empty_and_changing_taps_takes_effect() -> None:
    target = tiny()
    ids, mask = tokens(1, 5), torch.ones(1, 5)
    hidden, _, _ = alone(target, ids[0])
    assert target.features(ids, mask, None, None, ()).hidden.shape == (1, 5, 0)
    all_taps = target.features(ids, mask, None, None, TAPS).hidden
    torch.testing.assert_close(all_taps[0], hidden, **EXACT)
    torch.testing.assert_close(target.features(ids, mask, None, None, [2]).hidden[0], hidden[:, 64:96], **EXACT)
    assert not target.taps.kept


def test_features_do_not_form_logits_and_untapped_layers_are_not_kept() -> None:
    target = tiny()
    called = []
    handle = target.head.register_forward_hook(lambda *_: called.append(1))
    target.features(tokens(1, 5), torch.ones(1, 5), None, None, TAPS)
    handle.remove()
    assert not called
    hooked = [index for index, layer in enumerate(target.decoder.layers) if layer._forward_hooks]
    assert hooked == [0, 2, 3]


@pytest.mark.parametrize("taps", [(4,), (2, 1), (0, 9)])
def test_impossible_taps_are_refused(taps: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match="from -1"):
        tiny().features(tokens(1, 5), torch.ones(1, 5), None, None, taps)


def test_soft_capping_is_the_architectures() -> None:
    from attrs import evolve

    plain = tiny()
    capped = TransformersTarget(plain.model, evolve(plain.architecture, logit_softcap=0.5))
    sequence = tokens(6)
    logits = []
    for target in (plain, capped):
        target.open_slots(1, 8)
        logits.append(step(target, {0: sequence}, {0: 0}).logits)
    torch.testing.assert_close(logits[1], 0.5 * torch.tanh(logits[0] / 0.5))
    assert logits[0].abs().max() > 0.5


def test_decoders_that_take_one_mask_for_all_layers_work_too() -> None:
    """Another decoder of transformers, without layer types in its config."""
    from attrs import evolve

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    target = TransformersTarget(model, evolve(tiny().architecture, model_type="llama"))
    first, second = tokens(6, seed=60), tokens(4, seed=61)
    packed = torch.cat([first, second])[None]
    documents, positions = torch.tensor([[0] * 6 + [1] * 4]), torch.tensor([[*range(6), *range(4)]])
    features = target.features(packed, torch.ones(1, 10), positions, documents, TAPS)
    torch.testing.assert_close(features.hidden[0, 6:], alone(target, second)[0], **EXACT)
    target.open_slots(2, 16)
    step(target, {0: first[:2], 1: second[:3]}, {0: 0, 1: 0})
    target.commit(torch.tensor([0, 1]), torch.tensor([2, 3]))
    out = step(target, {0: first[2:], 1: second[3:]}, {0: 2, 1: 3})
    torch.testing.assert_close(out.logits[0], alone(target, first)[2][2:], **EXACT)
    torch.testing.assert_close(out.logits[1, :1], alone(target, second)[2][3:], **EXACT)


def test_greedy_decoding_is_the_recorded_one() -> None:
    case = json.loads((PARITY / "qwen3-decode-dflash" / "case.json").read_text())
    prompts = [torch.tensor(sample["prompt"]) for sample in case["by_confidence_threshold"]["0.0"]["samples"]]
    where = PARITY / "qwen3-target"
    from transformers import AutoConfig

    target = Qwen3Adapter(AutoConfig.from_pretrained(where)).load(where, dtype=torch.float32, device="cpu")
    target.open_slots(len(prompts), 64)
    texts = {slot: prompt.tolist() for slot, prompt in enumerate(prompts)}
    done = dict.fromkeys(texts, 0)
    running = list(texts)
    while running:
        rows = {slot: torch.tensor(texts[slot][done[slot] :]) for slot in running}
        logits = step(target, rows, done, last_only=True).logits[:, 0]  # type: ignore[arg-type]
        for index, slot in enumerate(running):
            done[slot] = len(texts[slot])
            texts[slot].append(int(logits[index].argmax()))
        target.commit(torch.tensor(running), torch.tensor([done[slot] for slot in running]))
        limit = {slot: len(prompts[slot]) + case["max_new_tokens"] for slot in running}
        running = [s for s in running if texts[s][-1] not in case["stop_token_ids"] and len(texts[s]) < limit[s]]
    assert list(texts.values()) == case["target_greedy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("masked", [True, False])
def test_shared_keys_are_read_as_if_they_were_copied(dtype: torch.dtype, new: int, masked: bool) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    query = torch.randn(2, 6, new, 16, dtype=dtype)
    key, value = (torch.randn(2, 2, 40, 16, dtype=dtype).narrow(2, 0, 33) for _ in range(2))
    mask = torch.zeros(2, 1, new, 33, dtype=dtype).masked_fill_(torch.rand(2, 1, new, 33) < 0.4, -torch.inf)
    mask[..., 0] = 0
    mask = mask if masked else None
    ours, theirs = (
        act(module, query, key, value, mask, scaling=0.2, dropout=0.0)[0] for act in (_attend, sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, theirs)
