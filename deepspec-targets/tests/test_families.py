"""Targets of every family: features, decoding and loading are what the model itself computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec_core.errors import TargetError
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter

VOCAB = 61
TAPS = (-1, 0, 2, 4)
EXACT = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def target(family: Any, adapter: FamilyAdapter) -> TransformersTarget:
    return TransformersTarget(family.model(), adapter.architecture)


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(model: Any, ids_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Taps [T, C], last hidden [T, H] and logits [T, V] of one sequence, by the model's own forward."""
    out = model(ids_T[None], output_hidden_states=True)
    taps = torch.cat([out.hidden_states[tap + 1] for tap in TAPS], dim=-1)
    return taps[0], out.hidden_states[-1][0], out.logits[0]


def test_features_of_ragged_rows_are_the_models_hidden_states(target: TransformersTarget) -> None:
    sequences = [tokens(length, seed=length) for length in (14, 9, 2)]
    ids, mask = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    features = target.features(ids, mask, None, None, TAPS)
    for row, sequence in enumerate(sequences):
        hidden, last_hidden, logits = alone(target.model, sequence)
        torch.testing.assert_close(features.hidden[row, : len(sequence)], hidden, **EXACT)
        torch.testing.assert_close(features.last_hidden[row, : len(sequence)], last_hidden, **EXACT)
        cap = target.architecture.logit_softcap
        ours = features.last_hidden[row, : len(sequence)] @ target.head_weight().T
        torch.testing.assert_close(ours if cap is None else cap * torch.tanh(ours / cap), logits, **EXACT)


def test_packed_documents_are_as_if_alone(target: TransformersTarget) -> None:
    lengths = (6, 9, 3)
    documents = [tokens(length, seed=length) for length in lengths]
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    features = target.features(torch.cat(documents)[None], torch.ones(1, 18), position_ids, document_ids, TAPS)
    start = 0
    for document in documents:
        hidden, last_hidden, _ = alone(target.model, document)
        span = slice(start, start + len(document))
        torch.testing.assert_close(features.hidden[0, span], hidden, **EXACT)
        torch.testing.assert_close(features.last_hidden[0, span], last_hidden, **EXACT)
        start += len(document)


def test_ragged_decoding_with_rejected_tokens_is_the_full_forward(target: TransformersTarget) -> None:
    """Far beyond the sliding windows; every call feeds two tokens too many, which are not committed."""
    sequences = [tokens(20, seed=10), tokens(17, seed=11), tokens(25, seed=12)]
    expected = [alone(target.model, sequence) for sequence in sequences]
    target.open_slots(3, 32)
    done = [0, 0, 0]
    for call in ({0: 5, 1: 9, 2: 1}, {0: 1, 1: 1, 2: 1}, {1: 4}, {0: 3, 2: 8}, {2: 6}, {0: 8, 1: 2, 2: 4}):
        rows = [torch.cat([sequences[s][done[s] : done[s] + n], tokens(2, seed=n)]) for s, n in call.items()]
        width = max(map(len, rows))
        ids, positions = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -1)
        for index, (slot, row) in enumerate(zip(call, rows, strict=True)):
            ids[index, : len(row)], positions[index, : len(row)] = row, torch.arange(len(row)) + done[slot]
        out = target.decode(torch.tensor(list(call)), ids, positions, TAPS)
        for index, (slot, count) in enumerate(call.items()):
            span = slice(done[slot], done[slot] + count)
            torch.testing.assert_close(out.hidden[index, :count], expected[slot][0][span], **EXACT)
            torch.testing.assert_close(out.logits[index, :count], expected[slot][2][span], **EXACT)
            done[slot] += count
        target.commit(torch.tensor(list(call)), torch.tensor([done[slot] for slot in call]))
    assert done == [17, 16, 20]


def test_a_tree_is_each_of_its_paths_alone(target: TransformersTarget) -> None:
    """Far beyond the sliding windows, in two slots with trees of other shapes; then one path of each goes on."""
    prompts, more = [tokens(9, seed=20), tokens(14, seed=21)], tokens(5, seed=22)
    trees = [[-1, 0, 0, 1, 2, 4, 1, 5], [-1, 0, 1, 1, 3, 4, -1, -1]]  # parents; of the second slot six tokens
    counts, kept = [8, 6], [[0, 2, 4, 5, 7], [0, 1, 3, 4]]
    ids_BT, columns_T = tokens(16, seed=23).view(2, 8), torch.arange(8)
    sees_BTT = torch.zeros(2, 8, 8, dtype=torch.bool)
    for row, parents in enumerate(trees):
        for column, parent in enumerate(parents):
            sees_BTT[row, column, column] = True
            if parent >= 0:
                sees_BTT[row, column] |= sees_BTT[row, parent]
    slots_B, lengths_B = torch.tensor([0, 2]), torch.tensor([9, 14])
    target.open_slots(3, 64)
    for slot, prompt in zip((0, 2), prompts, strict=True):
        target.decode(torch.tensor([slot]), prompt[None], torch.arange(len(prompt))[None], TAPS)
    target.commit(slots_B, lengths_B)
    given_BT = columns_T < torch.tensor(counts)[:, None]
    positions_BT = (lengths_B[:, None] + sees_BTT.sum(2) - 1).where(given_BT, -1)
    out = target.decode(slots_B, ids_BT, positions_BT, TAPS, sees=sees_BTT)
    for row, prompt in enumerate(prompts):
        for column in range(counts[row]):
            path = columns_T[sees_BTT[row, column]]
            hidden, _, logits = alone(target.model, torch.cat([prompt, ids_BT[row, path]]))
            torch.testing.assert_close(out.hidden[row, column], hidden[-1], **EXACT)
            torch.testing.assert_close(out.logits[row, column], logits[-1], **EXACT)
    paths = torch.tensor([[*path, *[0] * (6 - len(path))] for path in kept])
    target.commit(slots_B, lengths_B + torch.tensor(list(map(len, kept))), paths)
    for row, (slot, prompt) in enumerate(zip((0, 2), prompts, strict=True)):
        text = torch.cat([prompt, ids_BT[row, kept[row]], more])
        start = len(text) - len(more)
        again = target.decode(torch.tensor([slot]), more[None], torch.arange(start, len(text))[None], TAPS)
        hidden, _, logits = alone(target.model, text)
        torch.testing.assert_close(again.hidden[0], hidden[start:], **EXACT)
        torch.testing.assert_close(again.logits[0], logits[start:], **EXACT)


def test_a_tree_with_positions_of_a_chain_is_refused(target: TransformersTarget) -> None:
    target.open_slots(1, 16)
    sees = torch.tensor([[[True, False, False], [True, True, False], [True, False, True]]])
    with pytest.raises(RuntimeError, match="positions go on"):
        target.decode(torch.tensor([0]), tokens(3, seed=1)[None], torch.tensor([[0, 1, 2]]), TAPS, sees=sees)


def loaded(where: Path, registry: Registry, family: Any) -> Any:
    adapter = open_adapter(where, registry=registry, draft_layer=family.layer)
    return load_target(adapter, where, dtype=torch.float32, device="cpu")


def agree(target: Any, model: Any) -> None:
    ids = tokens(9, seed=3)
    hidden, last_hidden, _ = alone(model, ids)
    features = target.features(ids[None], torch.ones(1, 9), None, None, TAPS)
    torch.testing.assert_close(features.hidden[0], hidden, **EXACT)
    torch.testing.assert_close(features.last_hidden[0], last_hidden, **EXACT)


def test_a_saved_target_loads_and_is_checked_strictly(family: Any, registry: Registry, tmp_path: Path) -> None:
    model = family.model()
    model.save_pretrained(tmp_path)
    target = loaded(tmp_path, registry, family)
    assert target.architecture.dense == (family.layer is None)
    agree(target, model)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("layers.3.self_attn.q_proj.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"missing: \S*layers\.3\.self_attn\.q_proj\.weight"):
        loaded(tmp_path, registry, family)


def vision(name: str) -> Any:
    """Small vision parts, whose weights the text part must do without."""
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name == "gemma3":
        return transformers.SiglipVisionConfig(**small, image_size=28, patch_size=14).to_dict()
    if name == "gemma4-unified":
        return {"mm_embed_dim": 16, "output_proj_dims": 16}
    return small | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4-unified"])
def test_of_a_multimodal_model_only_the_text_part_is_loaded(
    name: str, families: Any, registry: Registry, tmp_path: Path
) -> None:
    import transformers

    family = families[name]
    kind = {"gemma3": "Gemma3", "gemma4": "Gemma4", "gemma4-unified": "Gemma4Unified"}[name]
    parts: dict[str, Any] = {"text_config": family.config().to_dict(), "vision_config": vision(name)}
    if name != "gemma3":
        parts["audio_config"] = None
    config = getattr(transformers, f"{kind}Config")(**parts)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("vision" in weight for weight in names)
    target = loaded(tmp_path, registry, family)
    assert not [parameter for parameter, _ in target.model.named_parameters() if "vision" in parameter]
    agree(target, model)
    whole = TransformersTarget(model, target.architecture)  # as quantised ones are
    agree(whole, model)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"another_tower.weight": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match=r"not in the model: another_tower\.weight"):
        loaded(tmp_path, registry, family)


def test_both_spellings_of_the_gemma4_config_load(families: Any, registry: Registry, tmp_path: Path) -> None:
    family = families["gemma4"]
    model = family.model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    full = {"head_dim": 16, "num_key_value_heads": 1}
    new = {"per_layer_config": {"2": full, "5": full}}
    old = {"global_head_dim": 16, "num_global_key_value_heads": 1}
    for spelling, other in ((new, old), (old, new)):
        path.write_text(json.dumps({key: value for key, value in written.items() if key not in other} | spelling))
        agree(loaded(tmp_path, registry, family), model)
