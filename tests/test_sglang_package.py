"""Exports in the format `sglang`, read, loaded and computed by SGLang's own package on a CPU.

It runs in an environment of its own, without its kernels for GPUs (sglang_asked.py has what it is asked). Its models,
with its attention in plain PyTorch, compute a made-up round; the logits are the draft's. It cannot serve there: its
servers for DFlash and DSpark refuse a CPU, and the server's loop needs the kernels.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, fields, frozen
from engine_environment import environment, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec_core.checkpoints.export_facts import facts_of, target_name
from deepspec_core.checkpoints.exports import Format
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.families.styled import TARGET_FAMILY
from deepspec_core.interface.models import Target
from deepspec_core.layers.options import LayerOptions
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_export import sglang
from deepspec_export.verification import made_up_round

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

SCRIPT = Path(__file__).with_name("sglang_asked.py")
# What SGLang imports on the way to its drafts; kernels, images, audio and grammars are not among them.
PINS = """
torch==2.13.0 triton==3.7.1 transformers==5.19.0 tokenizers==0.23.2 compressed-tensors==0.18.0 apache-tvm-ffi==0.1.11
aiohttp==3.14.5 dill==0.4.1 einops==0.8.2 fastapi==0.165.0 gguf==0.19.0 interegular==0.3.3 ipython==9.18.1
llguidance==1.9.1 msgspec==0.23.0 numpy==2.4.6 openai==2.8.0 orjson==3.13.0 packaging==26.4
partial-json-parser==0.2.1.1.post7 pillow==13.0.0 prometheus-client==0.26.0 psutil==7.2.2 pybase64==1.5.1
pydantic==2.14.4 python-multipart==0.0.34 pyzmq==27.3.0 requests==2.34.2 safetensors==0.8.0 sentencepiece==0.2.1
setproctitle==1.3.8 tqdm==4.70.1 uvicorn==0.54.0 xxhash==4.1.0 zstandard==0.25.0
"""
TAPS, CONTEXT, BLOCK, RANK, WINDOW = (2, 6, 10), 20, 5, 16, 8
KNOWN = torch.arange(300) * 3 + 1
LLAMA = {"num_layers": 1, "qk_norm": False}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
DRAFTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle3": ("eagle3", LLAMA),
    "eagle3, reduced vocabulary": ("eagle3", LLAMA | {"vocab_size": len(KNOWN)}),
    "dflash": ("dflash", {"anchor_predicts": False}),
    "dflash, yarn": ("dflash", {"anchor_predicts": False, "layer": {"rope": YARN}}),
    "dflash, anchor predicts": ("dflash", {}),
    "dspark": ("dspark", {}),
    "dspark, plain confidence": ("dspark", {"confidence_with_markov": False}),
    "dspark, no confidence": ("dspark", {"confidence_head": False}),
    "dspark, no Markov head": ("dspark", {"rank": 0, "confidence_with_markov": False}),
    "dspark, anchor predicts nothing": ("dspark", {"anchor_predicts": False}),
    "dspark, gated": ("dspark", {"head": "gated"}),
    "dspark, rnn": ("dspark", {"head": "rnn"}),
}
# Only read: SGLang's attention in PyTorch has no window where attention is not causal.
WINDOWED = ("dflash", {"anchor_predicts": False, "layer": {"window": WINDOW}})
ATOL = 1e-4
HEADS = {"gated": "GatedMarkovHead", "rnn": "RNNHead"}


@frozen(kw_only=True)
class Asked:
    """A draft, what it proposes, and what SGLang found in its export."""

    draft: DraftModel
    facts: ExportFacts
    log_probabilities: Tensor
    confidence: Tensor | None
    found: dict[str, Any]
    computed: dict[str, Tensor]

    def apart(self) -> float:
        """How far SGLang's log-probabilities are from the draft's, at most."""
        logits = self.draft.spread(self.computed["logits"])
        likely = self.log_probabilities > -20
        return float((logits.log_softmax(-1) - self.log_probabilities)[likely].abs().max())


@frozen(kw_only=True)
class Answers:
    """SGLang's answers by the names of drafts, the features of its targets, and those of transformers."""

    asked: dict[str, Asked]
    targets: dict[str, dict[str, Any]]
    features: Tensor


def _folder_of(target: Target) -> Path:
    return Path(target.plugins.registry.load("builtin", "tiny-qwen3")())


def _made(target: Target, algorithm: str, options: dict[str, Any]) -> tuple[DraftModel, TargetAdapter]:
    registry = target.plugins.registry
    spec = registry.get("draft", algorithm)
    assert spec.options is not None
    small = {"block_size": BLOCK, "ttt_length": 4, "num_layers": 2, "mask_token_id": 3} | options
    made = spec.options(**{one.name: small[one.name] for one in fields(spec.options) if one.name in small})
    if algorithm == "dspark":
        markov = {"rank": options.get("rank", RANK), "head": options.get("head", "vanilla")}
        made = evolve(made, markov=evolve(made.markov, **markov))
    adapter = target.adapter
    if layer := options.get("layer"):
        adapter = type(adapter)(AutoConfig.from_pretrained(_folder_of(target)), LayerOptions(**layer))
    torch.manual_seed(5)
    draft = with_large_weights(registry.load("draft", algorithm)(made, adapter, TAPS)).eval()
    if draft.vocabulary is not None:
        draft.vocabulary.choose(KNOWN)
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    return draft, adapter


def _renamed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.self_attn.query_norm.weight"] = weights.pop("layers.0.self_attn.q_norm.weight")
    save_file(weights, folder / "model.safetensors")


def _with_keys(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        keys = json.loads((folder / "config.json").read_text())
        change(keys)
        (folder / "config.json").write_text(json.dumps(keys))

    return changed


LATER = {"eagle_aux_hidden_state_layer_ids": [tap + 1 for tap in TAPS]}
# Exports that are broken after they were written: what is wrong, the draft, and how.
BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a renamed weight": ("dflash", _renamed),
    "layers counted from one": ("eagle3", _with_keys(lambda keys: keys["eagle_config"].update(LATER))),
    "the other convention of slots": ("dspark", _with_keys(lambda keys: keys.update(sample_from_anchor=False))),
    "causal blocks": ("dflash", _with_keys(lambda keys: keys.update(is_causal=True))),
    "another rotary base": ("eagle3", _with_keys(lambda keys: keys["rope_parameters"].update(rope_theta=1e6))),
}


@pytest.fixture(scope="session")
def answers(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """All drafts, asked about in one process."""
    interpreter = environment("sglang", *PINS.split(), alone=["sglang==0.5.23"], module="torch, transformers, triton")
    folder = tmp_path_factory.mktemp("sglang")
    asked = [(name, name, lambda _: None, "sglang", "compact") for name in DRAFTS]
    asked += [(name, of, change, "sglang", "compact") for name, (of, change) in BROKEN.items()]
    asked += [("window", "window", lambda _: None, "sglang", "static")]
    asked += [("z-lab's layout", "dflash", lambda _: None, "z-lab", "static")]
    asked += [("no confidence, dynamic", "dspark, no confidence", lambda _: None, "sglang", "dynamic")]
    drafts: dict[str, tuple[DraftModel, ExportFacts, Tensor, Tensor | None]] = {}
    text = torch.arange(30) * 7 % 1024
    for name, of, change, format_name, mode in asked:
        algorithm, options = DRAFTS.get(of, WINDOWED)
        draft, adapter = _made(target, algorithm, options)
        facts = facts_of(draft, adapter, target=target_name("builtin:tiny-qwen3", base=folder))
        exported = folder / name / "export"
        exported.parent.mkdir()
        Format.of(format_name, algorithm, target.plugins.registry).write(draft, facts, exported)
        change(exported)
        with torch.no_grad():
            given, log_probabilities, confidence = made_up_round(draft, CONTEXT)
        save_file(
            {
                "ids": torch.cat([given.prompt_T, torch.tensor([given.first])]),
                "features": torch.cat([given.features[tap] for tap in TAPS], -1),
                "proposed": given.proposed_K,
                "text": text,
            },
            exported.parent / "given.safetensors",
        )
        served = json.loads((exported / "export.json").read_text())["served_as"]["method"]
        # SGLang makes the confidence head in every mode but the default one.
        dynamic = confidence is not None or mode == "dynamic"
        told = {"algorithm": served.upper(), "verify_mode": "compact" if dynamic else "static"}
        (exported.parent / "case.json").write_text(json.dumps(told))
        drafts[name] = (draft, facts, log_probabilities, confidence)
    builtin = _folder_of(target)
    run(interpreter, SCRIPT.read_text(), folder, builtin, seconds=1200)
    answers = {}
    for name, (draft, facts, log_probabilities, confidence) in drafts.items():
        computed = folder / name / "found.safetensors"
        answers[name] = Asked(
            draft=draft,
            facts=facts,
            log_probabilities=log_probabilities,
            confidence=confidence,
            found=json.loads((folder / name / "found.json").read_text()),
            computed=load_file(computed) if computed.exists() else {},
        )
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(builtin, dtype=torch.float32)
        hidden = plain(text[None], output_hidden_states=True).hidden_states
    features = torch.cat([hidden[tap + 1][0] for tap in TAPS], -1)
    targets = json.loads((folder / "targets.json").read_text())
    return Answers(asked=answers, targets=targets, features=features)


@pytest.mark.parametrize("name", [*DRAFTS, "z-lab's layout"])
def test_the_package_reads_what_is_meant(answers: Answers, name: str) -> None:
    one = answers.asked[name]
    found, description = one.found, one.facts.description
    assert "refused" not in found, found
    assert found["captured_before"] == [tap + 1 for tap in TAPS], "it takes what goes into the next layer"
    assert found["layers"] == description.num_layers
    # A round verifies the anchor and the proposals.
    assert found["num_draft_tokens"] == len(one.log_probabilities) + 1
    algorithm, options = DRAFTS.get(name, DRAFTS["dflash"])
    if algorithm == "eagle3":
        assert found["class"] == "LlamaForCausalLMEagle3"
        assert found["hot_token_ids"] == (KNOWN.tolist() if one.draft.vocabulary is not None else None)
        assert found["draft_vocab_size"] == one.computed["logits"].shape[-1] == options.get("vocab_size", 1024)
        return
    as_dflash = algorithm == "dflash" and not options.get("anchor_predicts", True)
    assert found["class"] == ("DFlashDraftModel" if as_dflash else "Qwen3DSparkModel")
    assert found["mask_token_id"] == one.facts.config["mask_token_id"]
    assert found["block_size"] == len(one.log_probabilities) + as_dflash
    assert (found["attention"], found["windows"]) == (["ENCODER_ONLY"], [-1, -1])
    if not as_dflash:
        assert found["sample_from_anchor"] is options.get("anchor_predicts", True)
        assert found["markov_head"] == HEADS.get(options.get("head", ""), "VanillaMarkov")


@pytest.mark.parametrize("name", [*DRAFTS, "z-lab's layout"])
def test_the_package_loads_every_weight(answers: Answers, name: str) -> None:
    found = answers.asked[name].found
    shared = {"eagle3": ["hot_token_id", "lm_head.weight", "model.embed_tokens.weight"]}
    shared["eagle3, reduced vocabulary"] = ["model.embed_tokens.weight"]
    assert found["missing"] == shared.get(name, []), "only what it takes from the target"
    assert found["skipped"] == (["t2d"] if "reduced" in name else [])


@pytest.mark.parametrize("name", [*DRAFTS, "z-lab's layout"])
def test_the_package_computes_what_the_draft_does(answers: Answers, name: str) -> None:
    one = answers.asked[name]
    assert one.apart() < ATOL
    assert one.log_probabilities.exp().std() > 1e-3, "distributions that differ from token to token"
    torch.testing.assert_close(one.computed["features"], answers.features, rtol=0, atol=1e-3)
    assert ("confidence" in one.computed) == (one.confidence is not None)
    if one.confidence is not None:
        torch.testing.assert_close(one.computed["confidence"], one.confidence, rtol=0, atol=ATOL)


def test_what_is_broken_shows(answers: Answers) -> None:
    renamed = answers.asked["a renamed weight"].found
    assert renamed["missing"] == ["layers.0.self_attn.q_norm.weight"]
    assert renamed["skipped"] == ["layers.0.self_attn.query_norm.weight"]
    later = answers.asked["layers counted from one"]
    assert later.found["captured_before"] == [tap + 2 for tap in TAPS]
    width = answers.features.shape[-1] // len(TAPS)
    assert later.computed["features"].shape[-1] == 2 * width, "none of what the target's last layer puts out"
    assert (later.computed["features"][:, :width] - answers.features[:, :width]).abs().max() > 0.1
    assert answers.asked["causal blocks"].found["attention"] == ["DECODER"]
    slots = answers.asked["the other convention of slots"]
    assert slots.found["sample_from_anchor"] is False
    for name in ("causal blocks", "another rotary base", "the other convention of slots"):
        assert answers.asked[name].apart() > 100 * ATOL, name


def test_a_window_counts_what_is_before_a_token(answers: Answers) -> None:
    found = answers.asked["window"].found
    assert (found["windows"], found["attention"]) == ([WINDOW - 1] * 2, ["ENCODER_ONLY"])


def test_a_draft_without_confidence_is_served_in_the_default_mode_only(answers: Answers) -> None:
    refused = answers.asked["no confidence, dynamic"].found["refused"]
    assert "confidence head is enabled" in refused
    assert "refused" not in answers.asked["dspark, no confidence"].found


def test_drafts_are_refused_whose_targets_give_them_no_layers(answers: Answers) -> None:
    families = {"Qwen3Moe": "qwen3_moe", "Gemma3": "gemma3_text", "Gemma4": "gemma4_text"}
    for name, told in answers.targets.items():
        assert "eagle3" in told["gives"], name
        family = families.get(name, name.lower())
        for draft, method in (("eagle3", "eagle3"), ("dflash", "dflash"), ("dspark", "dflash")):
            facts = answers.asked[draft].facts
            facts = evolve(facts, config={**facts.config, TARGET_FAMILY: family})
            gives_none = "gives no outputs of layers" in (sglang.unservable(facts) or "")
            assert gives_none == (method not in told["gives"]), (name, draft, told)
