"""Exports in the format `speculators`, loaded by the package of that name: its logits are the draft's.

The package computes in an environment of its own, on what a made-up round gives. It knows anchors as supervised
positions, and Eagle3's proposals as steps of test-time training with the proposed tokens as the text.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, fields
from engine_environment import environment, run
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.export_facts import facts_of, target_name
from deepspec_core.checkpoints.exports import Format
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.interface.models import Target
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_export.verification import made_up_round

pytestmark = pytest.mark.slow

CONTEXT = 20
SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
import speculators.models.dflash.core as dflash
import speculators.models.dspark.core as dspark
import speculators.models.eagle3.core as eagle3

folder, given, out = sys.argv[1:]
inputs = load_file(given)
config = SpeculatorModelConfig.from_pretrained(folder)
config.transformer_layer_config._attn_implementation = "eager"
model = SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
missing = [name for name, tensor in model.named_parameters() if not tensor.isfinite().all()]
assert not missing, missing
seen = {}

class Done(Exception):
    pass

def of_a_block(logits, targets, *rest, **named):
    seen["logits"] = logits[0]
    if type(model).__name__ == "DSparkDraftModel" and torch.is_tensor(rest[0]):
        seen["confidence"] = rest[0][0]
    raise Done

def of_a_step(logits, targets, loss_mask, prev_correct, step, *rest, **named):
    seen.setdefault("steps", []).append(logits[0, int(inputs["anchor"]) - 1])
    return torch.zeros(()), {}

dflash.compute_metrics = dspark.compute_metrics = of_a_block
eagle3.compute_metrics = of_a_step
ids, hidden = inputs["ids"][None], inputs["hidden"][None]
length = ids.shape[1]
last = torch.zeros(1, length, config.transformer_layer_config.hidden_size)
documents = torch.zeros(1, length, dtype=torch.long)
mask = torch.zeros(1, length, dtype=torch.long)
with torch.no_grad():
    if type(model).__name__ == "Eagle3DraftModel":
        # Index q has the features of position q and the token after it.
        model(hidden[:, :-1], ids[:, 1:], documents[:, 1:], loss_mask=torch.ones_like(mask[:, 1:]),
              verifier_last_hidden_states=last[:, 1:], ttt_steps=int(inputs["proposals"]))
        seen["logits"] = torch.stack(seen.pop("steps"))
    else:
        mask[0, int(inputs["anchor"])] = 1
        extra = {"max_anchors": 1}
        if type(model).__name__ == "DSparkDraftModel":
            extra["tv_loss_fn"] = None
        try:
            model(hidden, ids, mask, last, documents, **extra)
        except Done:
            pass
save_file({name: tensor.contiguous() for name, tensor in seen.items()}, out)
"""
DRAFTS = {
    "dflash": ("dflash", {"anchor_predicts": False}),
    "dflash, anchor predicts": ("dflash", {}),
    "dspark": ("dspark", {}),
    "dspark, plain confidence": ("dspark", {"confidence_with_markov": False}),
    "dspark, anchor predicts nothing": ("dspark", {"anchor_predicts": False}),
    "eagle3": ("eagle3", {"num_layers": 1}),
    "eagle3, two layers": ("eagle3", {"num_layers": 2}),
    "eagle3, no head norms": ("eagle3", {"num_layers": 1, "qk_norm": False}),
    "eagle3, reduced vocabulary": ("eagle3", {"num_layers": 1, "vocab_size": 300}),
}


@pytest.fixture(scope="session")
def interpreter() -> Path:
    """The package's environment."""
    return environment("speculators", "speculators==0.9.0", module="speculators")


def _draft(target: Target, algorithm: str, options: dict[str, Any]) -> DraftModel:
    registry = target.plugins.registry
    spec = registry.get("draft", algorithm)
    assert spec.options is not None
    small = {"block_size": 5, "ttt_length": 4, "num_layers": 2} | options
    made = spec.options(**{one.name: small[one.name] for one in fields(spec.options) if one.name in small})
    if algorithm == "dspark":
        made = evolve(made, markov=evolve(made.markov, rank=16))
    torch.manual_seed(5)
    draft = with_large_weights(registry.load("draft", algorithm)(made, target.adapter, (2, 6, 10))).eval()
    if draft.vocabulary is not None:
        draft.vocabulary.choose(torch.arange(300) * 3 + 1)
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    return draft


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DRAFTS)
def test_the_package_computes_what_the_draft_does(interpreter: Path, target: Target, tmp_path: Path, name: str) -> None:
    algorithm, options = DRAFTS[name]
    draft = _draft(target, algorithm, options)
    facts = facts_of(draft, target.adapter, target=target_name("builtin:tiny-qwen3", base=tmp_path))
    exported = tmp_path / "exported"
    Format.of("speculators", algorithm, target.plugins.registry).write(draft, facts, exported)
    with torch.no_grad():
        given, mine, confidence = made_up_round(draft, CONTEXT)
    found = _ask_the_package(interpreter, exported, _folder_of(target), tmp_path, draft, given)
    logits = draft.spread(found["logits"][-len(given.proposed_K) :])
    torch.testing.assert_close(logits.log_softmax(-1), mine, rtol=0, atol=2e-3)
    assert mine.exp().std() > 1e-3, "distributions that differ from token to token"
    if confidence is not None:
        torch.testing.assert_close(found["confidence"][-len(confidence) :], confidence, rtol=0, atol=2e-3)


def test_a_wrong_convention_shows(interpreter: Path, target: Target, tmp_path: Path) -> None:
    draft = _draft(target, "eagle3", {"num_layers": 1})
    facts = facts_of(draft, target.adapter, target=target_name("builtin:tiny-qwen3", base=tmp_path))
    exported = tmp_path / "exported"
    Format.of("speculators", "eagle3", target.plugins.registry).write(draft, facts, exported)
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"norm_before_residual": True}))
    with torch.no_grad():
        given, mine, _ = made_up_round(draft, CONTEXT)
    found = _ask_the_package(interpreter, exported, _folder_of(target), tmp_path, draft, given)
    assert (found["logits"].log_softmax(-1) - mine).abs().max() > 0.05


def _folder_of(target: Target) -> Path:
    return Path(target.plugins.registry.load("builtin", "tiny-qwen3")())


def _ask_the_package(
    interpreter: Path, exported: Path, target: Path, scratch: Path, draft: DraftModel, given: Any
) -> dict[str, torch.Tensor]:
    copy = scratch / "copy"
    shutil.copytree(exported, copy)
    config = json.loads((copy / "config.json").read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(target)
    (copy / "config.json").write_text(json.dumps(config))
    taps, hidden_size = draft.describe().taps, draft.lm_head.weight.shape[1]
    ids = torch.cat([given.prompt_T, torch.tensor([given.first]), given.proposed_K, torch.zeros(6, dtype=torch.long)])
    hidden = torch.zeros(len(ids), len(taps) * hidden_size)
    hidden[:CONTEXT] = torch.cat([given.features[tap] for tap in taps], -1)
    inputs = {
        "ids": ids,
        "hidden": hidden,
        "anchor": torch.tensor(CONTEXT),
        "proposals": torch.tensor(len(given.proposed_K)),
    }
    save_file(inputs, scratch / "given.safetensors")
    run(interpreter, SCRIPT, copy, scratch / "given.safetensors", scratch / "found.safetensors")
    return load_file(scratch / "found.safetensors")
