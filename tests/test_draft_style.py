"""`[draft.layer] style`: a draft with another family's layers changes no output, and is kept as one of that family.

test_every_pair.py trains some; deepspec-export's tests export them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.layers.options import LayerOptions
from deepspec_core.layers.softcap import softcapped
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import open_adapter

STYLED = [("dflash", "gemma3", {"anchor_predicts": False}), ("eagle3", "qwen2", {"qk_norm": False})]


@pytest.fixture
def styled(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry
) -> Callable[..., Any]:
    """styled(algorithm, family, style, **options): the tiny target opened for a draft in a style, and such a draft."""

    def make(algorithm: str, family: str, style: str = "qwen3", **options: Any) -> tuple[Any, DraftModel]:
        target = tiny_target(family)
        layer = LayerOptions(style=style, intermediate_size=48)
        target = evolve(target, adapter=open_adapter(target.where, registry=registry, draft_layer=layer))
        return target, tiny_draft(algorithm, target, **options).eval()

    return make


def outputs(target: Any, proposer: Any) -> dict[str, Completion]:
    requests = [Request(id=str(i), prompt_ids=tuple(3 + (5 * i + 3 * j) % 30 for j in range(3 + 2 * i)), seed=i)
                for i in range(4)]  # fmt: skip
    found = decode(target.model, proposer, requests, sampling=Sampling(), stop_ids=(1,), max_new_tokens=16,
                   batch_size=3, max_length=64)  # fmt: skip
    return {one.id: one for one in found}


@pytest.mark.parametrize(("algorithm", "family", "options"), STYLED)
def test_it_changes_no_output_and_a_checkpoint_is_one_of_the_style(
    tmp_path: Path, registry: Registry, styled: Callable[..., Any], algorithm: str, family: str, options: dict[str, Any]
) -> None:
    target, draft = styled(algorithm, family, **options)
    plain, drafted = outputs(target, None), outputs(target, draft.proposer())
    assert all(plain[name].output_ids == drafted[name].output_ids for name in plain)
    save_draft(draft, target.adapter, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["architectures"][0].startswith("Qwen3")
    assert config["target_model_type"] == target.model.architecture.model_type
    assert (config["hidden_act"], config["attention_bias"]) == ("silu", False)
    adapter = draft_adapter(tmp_path / "draft", registry=registry)
    loaded = load_draft(tmp_path / "draft", registry=registry, adapter=adapter)
    assert loaded.describe() == draft.describe()
    again = outputs(target, loaded.proposer())
    assert all(again[name].rounds == drafted[name].rounds for name in plain), "the same proposals were accepted"


@pytest.mark.parametrize("style", ["gemma3", "gemma4", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_every_family_is_a_style_of_every_other(
    tiny_target: Callable[..., Any], registry: Registry, tiny_draft: Callable[..., DraftModel], tmp_path: Path,
    style: str,
) -> None:  # fmt: skip
    for family in ("llama", "gemma4", "qwen3_moe"):
        target = tiny_target(family)
        layer = LayerOptions(style=style, intermediate_size=48, window=8)
        adapter = open_adapter(target.where, registry=registry, draft_layer=layer)
        assert isinstance(adapter, TargetAdapter)
        draft = tiny_draft("dflash", evolve(target, adapter=adapter))
        assert draft.window == 8
        save_draft(draft, adapter, tmp_path / family)
        again = load_draft(
            tmp_path / family, registry=registry, adapter=draft_adapter(tmp_path / family, registry=registry)
        )
        assert again.describe() == draft.describe()
        assert all(torch.equal(value, draft.state_dict()[name]) for name, value in again.state_dict().items())


def test_sizes_and_the_rotary_base_are_the_targets_unless_given(
    tiny_target: Callable[..., Any], registry: Registry
) -> None:
    target = tiny_target("gemma3")
    open_with = lambda **layer: open_adapter(  # noqa: E731
        target.where, registry=registry, draft_layer=LayerOptions(style="qwen3", **layer)
    ).draft_config(1, {})
    found = open_with()
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 2, 8)
    assert (found.intermediate_size, found.hidden_size, found.vocab_size) == (48, 32, 40)
    assert found.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}, "of the target's full attention"
    assert (found.eos_token_id, found.pad_token_id) == (1, 0)
    given = open_with(num_heads=6, num_kv_heads=3, head_dim=16, intermediate_size=20, rope={"rope_theta": 5e5})
    assert (given.num_attention_heads, given.num_key_value_heads, given.head_dim) == (6, 3, 16)
    assert (given.intermediate_size, given.rope_parameters["rope_theta"]) == (20, 5e5)


def test_it_embeds_and_forms_logits_as_the_style_and_is_compared_with_the_capped_target(
    styled: Callable[..., Any],
) -> None:
    target, draft = styled("dspark", "gemma4")
    ids = torch.arange(5)
    assert torch.equal(draft.embed_tokens(ids), target.model.embedding_weight()[ids]), "no scale"
    heads, cap = draft.heads(), target.model.architecture.logit_softcap
    assert (heads.softcap, heads.target_softcap) == (None, cap)
    hidden = 20 * torch.randn(3, 32)
    assert torch.equal(draft.logits(hidden), hidden @ target.model.head_weight().T)
    assert not torch.allclose(draft.logits(hidden), softcapped(draft.logits(hidden), cap))


def test_a_style_is_tried_before_a_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(run_file), "--dry-run", "--set", "draft.layer.style=llama"]) == 0
    assert (
        main(["run", str(run_file), "--dry-run", "--set", "draft.layer.style=llama", "--set", "draft.layer.window=3"])
        == 2
    )
    assert "at least [draft] block_size" in capsys.readouterr().err


def test_an_unknown_style_is_refused_with_the_nearest_name(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(run_file), "--set", "draft.layer.style=qwen33"]) == 2
    seen = capsys.readouterr().err
    assert "draft.layer.style" in seen
    assert "qwen3" in seen


@pytest.mark.slow
def test_a_run_trains_decodes_and_keeps_it(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style = ["--set", "draft.layer.style=llama", "--set", "run.threads=1"]
    assert main(["run", str(run_file), "--smoke", *style]) == 0
    folder = run_file.parent / "runs" / "quickstart-dflash-smoke"
    config = json.loads((folder / "draft" / "config.json").read_text())
    assert (config["model_type"], config["target_model_type"]) == ("llama", "qwen3")
    assert all(not one["mismatches"] for one in json.loads((folder / "metrics.json").read_text())["results"])
    capsys.readouterr()
    assert main(["run", str(run_file), "--smoke", "--set", "draft.layer.style=mistral", "--set", "run.threads=1"]) == 2
    assert "draft.layer.style" in capsys.readouterr().err
