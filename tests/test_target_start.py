"""[draft] init = "target:last" or "target:taps": a draft's layers start as copies of the target's, or it is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import ConfigError
from deepspec_core.estimating.memory import fake_tensors
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.target_layers import check_target_start, layers_of, take_target_layers
from deepspec_core.pipeline.training import new_draft
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import resolve_model

FAMILIES = ("gemma3", "gemma4", "llama", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize(
    ("start", "draft_layers", "taps", "expected"),
    [
        ("target:last", 3, (1, 9), (9, 10, 11)),
        ("target:last", 12, (1, 9), tuple(range(12))),
        ("target:taps", 3, (2, 4, 6, 8, 10), (2, 6, 10)),
        ("target:taps", 5, (2, 4, 6, 8, 10), (2, 4, 6, 8, 10)),
        ("target:taps", 5, (3, 7), (3, 3, 7, 7, 7)),
        ("target:taps", 1, (-1, 3, 7), (7,)),
        ("target:taps", 2, (-1, 3), (3, 3)),
    ],
)
def test_which_layers_are_copied(
    start: str, draft_layers: int, taps: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert layers_of(start, draft_layers=draft_layers, taps=taps, target_layers=12) == expected


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """make_run(target's directory, KEY=VALUE...): a DFlash draft of two layers with two taps."""

    def make(target: Path | str, *overrides: str) -> Run:
        path = tmp_path / "run.toml"
        path.write_text(
            f'[run]\nname = "a"\noutput = "out"\nstages = ["train"]\n[target]\nmodel = "{target}"\nlayers = [1, 3]\n'
            '[data]\nsources = [{path = "none.jsonl"}]\nmax_length = 32\n[draft]\ntype = "dflash"\n'
            'init = "target:taps"\nblock_size = 3\nnum_layers = 2\nmask_token_id = 39\n'
        )
        plugins = load_plugins()
        return Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=path, plugins=plugins)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copied_layer_computes_what_the_targets_does(
    family: str, make_run: Callable[..., Run], tiny_target: Callable[..., Any]
) -> None:
    """On the output of the layer before it, under a causal mask. Layer 2 of families with windows has none."""
    target = tiny_target(family)
    run = make_run(target.where, "draft.num_layers=1", "target.layers=[2]")
    with fake_tensors():
        check_target_start(run, new_draft(run))
    draft = new_draft(run)
    take_target_layers(run, draft)
    (layer,) = (part for part in draft.modules() if isinstance(part, DraftLayer))
    ids_BT = torch.arange(9)[None] % 30
    features = target.model.features(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), None, None, (1, 2))
    before_BTH, after_BTH = features.hidden.chunk(2, dim=-1)
    found_BTH = layer(before_BTH, lambda normed_BTH: _causal(draft, layer, normed_BTH))
    torch.testing.assert_close(found_BTH, after_BTH, rtol=1e-4, atol=1e-5)
    assert torch.equal(draft.state_dict()["backbone.norm.weight"], _norm_of(target.where))


def _causal(draft: DraftModel, layer: DraftLayer, normed_BTH: torch.Tensor) -> torch.Tensor:
    attention = layer.attention
    rotary = draft.backbone.rotary(normed_BTH, torch.arange(normed_BTH.shape[1])[None])
    keys, values = attention.keys_values(normed_BTH, rotary)
    queries = attention.queries(normed_BTH, rotary)
    attended = F.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=attention.scale, enable_gqa=True
    )
    return attention.combine(attended)


def _norm_of(where: Path) -> torch.Tensor:
    weights = load_file(where / "model.safetensors")
    (found,) = (value for name, value in weights.items() if name.endswith("norm.weight") and "layers" not in name)
    return found


def _refusal(run: Run) -> ConfigError:
    with fake_tensors():
        draft = new_draft(run)
    with pytest.raises(ConfigError, match="cannot start from the target's") as caught:
        check_target_start(run, draft)
    assert "draft.init = 'target:" in str(caught.value.where)
    return caught.value


def test_drafts_of_other_shapes_are_refused_with_both_shapes(
    make_run: Callable[..., Run], tiny_target: Callable[..., Any]
) -> None:
    qwen3 = tiny_target("qwen3").where

    def refused(where: Path | str, *overrides: str) -> ConfigError:
        return _refusal(make_run(where, *overrides))

    error = refused(qwen3, "draft.layer.intermediate_size=20")
    assert str(error.found).startswith("draft.layer.intermediate_size = 20: model.layers.1.mlp.")
    assert re.search(r"layers\.1\.mlp\.down_proj\.weight \[32, 20\]", str(error.found))
    assert re.search(r"layers\.1\.mlp\.down_proj\.weight \[32, 48\]", str(error.expected))
    error = refused(qwen3, "draft.num_layers=40", "draft.init=target:last")
    assert (error.found, error.expected) == ("40 layers of the draft", "at most the target's 6")
    error = refused(qwen3, "draft.layer.style=llama")
    assert (error.found, error.expected) == (
        "draft.layer.style = 'llama'",
        "layers of the target's own family, 'qwen3'",
    )
    assert "one tapped layer" in str(refused(qwen3, "target.layers=[-1]").expected)
    # A layer with a window has other heads than those with full attention, which every draft has.
    error = refused(tiny_target("gemma4").where, "target.layers=[2, 3]")
    assert "layers.3.self_attn.k_norm.weight [16]" in str(error.found)
    assert "layers.3.self_attn.k_norm.weight [8]" in str(error.expected)
    error = refused(tiny_target("qwen3_moe").where, "draft.layer.intermediate_size=48")
    assert "mlp.down_proj.weight is not in the target's files" in str(error.expected)


@pytest.mark.parametrize("sizes", [(8, 4, 4), (2, 1, 16)])
def test_matrices_of_the_same_shape_cut_into_other_heads_are_refused(
    sizes: tuple[int, int, int], make_run: Callable[..., Run], tiny_target: Callable[..., Any]
) -> None:
    """Llama has no norms of queries and keys, so no shape of a weight says the heads."""
    keys = ("num_heads", "num_kv_heads", "head_dim")
    overrides = [f"draft.layer.{key}={size}" for key, size in zip(keys, sizes, strict=True)]
    run = make_run(tiny_target("llama").where, *overrides)
    error = _refusal(run)
    assert error.found == ", ".join(f"draft.layer.{key} = {size}" for key, size in zip(keys, sizes, strict=True))
    assert str(error.expected).startswith(
        "draft.layer.num_heads = 4, draft.layer.num_kv_heads = 2, draft.layer.head_dim = 8"
    )
    draft = new_draft(run)
    with pytest.raises(ConfigError, match="cannot start from the target's"):
        take_target_layers(run, draft)
    found = _refusal(make_run(tiny_target("llama").where, overrides[1])).found
    assert found == f"draft.layer.num_kv_heads = {sizes[1]}", "only what differs"


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of DeepSpec. Transformers 5.10 has its own about keys of Gemma 3's rotary embedding."""
    return [one.getMessage() for one in caplog.records if one.levelname == "WARNING" and one.name == "deepspec"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_another_rotary_base_is_taken_with_a_warning(
    family: str, make_run: Callable[..., Run], tiny_target: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(*overrides: str) -> list[str]:
        run = make_run(tiny_target(family).where, "draft.num_layers=1", "target.layers=[2]", *overrides)
        caplog.clear()
        with fake_tensors():
            check_target_start(run, new_draft(run))
        return ours(caplog)

    assert warnings_of() == []
    assert warnings_of("draft.layer.window=8") == []
    (said,) = warnings_of("draft.layer.rope={rope_theta=12345.0}")
    theirs, the_drafts = said.split("; the draft's have ")
    assert "rope_theta = " in theirs
    assert "rope_theta = 12345.0. The target's weights are copied" in the_drafts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_targets_own_family_as_a_style_is_accepted(
    family: str, make_run: Callable[..., Run], tiny_target: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the target's config says more than sizes: Gemma 4's values are its keys here."""
    run = make_run(tiny_target(family).where, "draft.num_layers=1", "target.layers=[2]", f"draft.layer.style={family}")
    with fake_tensors():
        check_target_start(run, new_draft(run))
    assert ours(caplog) == []
    styled = new_draft(run)
    take_target_layers(run, styled)
    plain_run = make_run(tiny_target(family).where, "draft.num_layers=1", "target.layers=[2]")
    plain = new_draft(plain_run)
    take_target_layers(plain_run, plain)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in styled.state_dict().items())


@pytest.mark.slow
def test_a_run_starts_so_and_goes_on_with_its_own(
    finished_copy: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    # So that the checkpoint of step 0 is written, and stays.
    text = ("train.evaluate_every=9", "train.keep_checkpoints=9", "train.evaluation.prompts=1", "draft.num_anchors=8")
    text = (*text, "train.evaluation.max_new_tokens=2", "draft.init=target:last", "run.threads=1")
    command = ["run", str(finished_copy), "--smoke", "--stages", "train"]
    command += [word for one in text for word in ("--set", one)]
    assert main(command) == 2
    assert "draft.init" in capsys.readouterr().err, "finished results are of another start"
    assert main([*command, "--force", "train"]) == 0
    seen = capsys.readouterr()
    assert "begun with target:last" in seen.out
    assert "copied from the target's layers 9, 10, 11" in seen.err
    begun = load_file(folder / "train" / "checkpoints" / "step-000000" / "draft" / "model.safetensors")
    own = load_file(resolve_model("builtin:tiny-qwen3", base=folder, registry=registry) / "model.safetensors")
    for name in ("self_attn.q_proj", "self_attn.k_norm", "mlp.down_proj", "input_layernorm"):
        for index in range(3):
            copied = own[f"model.layers.{9 + index}.{name}.weight"]
            assert torch.equal(begun[f"layers.{index}.{name}.weight"], copied.float()), name
    trained = load_file(folder / "draft" / "model.safetensors")
    assert not torch.equal(trained["layers.0.mlp.down_proj.weight"], begun["layers.0.mlp.down_proj.weight"])
    record = json.loads((folder / "train" / "stage.json").read_text())
    assert record["keys"]["draft.init"] == "target:last"
    # Interrupted, it goes on with its own weights.
    (folder / "train" / "stage.json").write_text(json.dumps({**record, "complete": False}))
    for checkpoint in (folder / "train").glob("checkpoints/step-*"):
        if checkpoint.name not in ("step-000000", "step-000009"):
            shutil.rmtree(checkpoint)
    assert main(command) == 0
    seen = capsys.readouterr()
    assert "train: resuming" in seen.out
    assert "copied from the target's layers" not in seen.err
    again = load_file(folder / "draft" / "model.safetensors")
    torch.testing.assert_close(again, trained, rtol=1e-5, atol=1e-6)


def test_before_the_first_stage_another_algorithm_and_another_name_are_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eagle3 = ["draft={type = 'eagle3', init = 'target:last'}", "loss={terms = {soft_ce = 1.0}}"]
    command = ["run", str(run_file), "--smoke"]
    assert main([*command, *(word for one in eagle3 for word in ("--set", one))]) == 2
    seen = capsys.readouterr()
    # Its attention reads two hidden states, so no shape of [draft.layer] would help.
    assert "its attention reads 256 numbers a token" in seen.err
    assert "the 128 that the target's attention reads" in seen.err
    assert "whatever their shape" in seen.err
    assert "starting" not in seen.out
    assert main([*command, "--set", "draft.init=target:first"]) == 2
    assert "one of target:last, target:taps, or a checkpoint" in capsys.readouterr().err
