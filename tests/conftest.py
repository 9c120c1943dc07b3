"""What tests across packages share: a finished small run of the quickstart; the built-in target and drafts for it; tiny
targets and drafts of every kind."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import fields, frozen
from exporter_plugin import offering
from plugin_on_path import install_project
from transformers import AutoConfig, AutoModelForCausalLM

import deepspec_core
from deepspec_core.checkpoints.published import save_draft
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.target import TargetAdapter, TargetModel
from deepspec_core.interface.models import Target
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline.threads import using
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter

EXAMPLES = Path(__file__).parents[1] / "examples" / "plugins"
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "dflash.toml"


def write_run_file(folder: Path) -> Path:
    """The DFlash quickstart's file in a folder of its own, its results beside it, its evaluation of fewer tokens."""
    path, text = folder / "train.toml", QUICKSTART.read_text()
    for written, wanted in {"../../runs/": "runs/", "max_new_tokens = 224": "max_new_tokens = 12"}.items():
        assert written in text
        text = text.replace(written, wanted)
    path.write_text(text)
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes with one thread, as the command line chooses for models this small."""
    with using(1):
        yield


@pytest.fixture(scope="session")
def new_run_file() -> Callable[[Path], Path]:
    """new_run_file(folder): the quickstart's run file in a folder, nothing run yet."""
    return write_run_file


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished smoke run; tests that change anything work on `finished_copy`."""
    path = write_run_file(tmp_path_factory.mktemp("finished"))
    assert main(["run", str(path), "--smoke", "--set", "run.threads=1"]) == 0
    return path


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """The same in a folder a test may change."""
    shutil.copytree(finished.parent, tmp_path / "copy")
    return tmp_path / "copy" / finished.name


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """offer(unservable=..., write=...): a plugin with the export format "plain"; see exporter_plugin.py."""
    return offering(tmp_path, monkeypatch)


@pytest.fixture
def example_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """example_plugin(name): a package of examples/plugins as if installed, its metadata from its own pyproject.toml."""

    def install(name: str) -> None:
        install_project(EXAMPLES / name, tmp_path / "installed", monkeypatch)

    return install


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The quickstart's run file, nothing run yet."""
    return write_run_file(tmp_path)


@pytest.fixture(scope="session")
def target() -> Target:
    """The built-in target, as `load_target` opens it."""
    return deepspec_core.load_target("builtin:tiny-qwen3")


@pytest.fixture(scope="session")
def drafts(target: Target, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every algorithm for the built-in target, with weights as they are drawn."""
    folder = tmp_path_factory.mktemp("drafts")
    registry = target.plugins.registry
    for name in ("dflash", "dspark", "eagle3"):
        torch.manual_seed(3)
        spec = registry.get("draft", name)
        draft = registry.load("draft", name)(spec.options(), target.adapter, (2, 6, 10))
        draft.adopt(target.model.embedding_weight(), target.model.head_weight())
        save_draft(draft, target.adapter, folder / name)
    return {name: folder / name for name in ("dflash", "dspark", "eagle3")}


@pytest.fixture(scope="session")
def judged_run(drafts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of a draft that judges its own tokens, at T = 0 and T = 1. Weights are as drawn."""
    folder = tmp_path_factory.mktemp("judged")
    task = folder / "task.jsonl"
    task.write_text("".join(json.dumps({"turns": [f"What is {n} + {n + 1}?"]}) + "\n" for n in range(6)))
    asked = ["--draft", str(drafts["dspark"]), "--target", "builtin:tiny-qwen3", "--task", str(task)]
    small = ["--temperature", "0", "--temperature", "1", "--max-new-tokens", "12", "--batch-size", "3"]
    assert main(["evaluate", *asked, *small, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def judged_copy(judged_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to change, in the working directory."""
    shutil.copytree(judged_run, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@frozen(kw_only=True)
class TinyTarget:
    """A random target of one family: its directory, its adapter (the draft's shape included) and the loaded model."""

    where: Path
    adapter: TargetAdapter
    model: TargetModel


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
_PATTERN = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "sliding_window": 8}
# The model type of a family's tiny target, by the adapter's name, and what its config needs beyond SIZES.
TINY = {
    "gemma3": ("gemma3_text", {**_PATTERN, "query_pre_attn_scalar": 8}),
    "gemma4": (
        "gemma4_text",
        {
            **_PATTERN, "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "final_logit_softcapping": 20.0,
        },
    ),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "olmo": ("olmo2", {}),
    "olmo-3": ("olmo3", _PATTERN),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
}  # fmt: skip
OWN_LAYER = LayerOptions(intermediate_size=48)


# Of a module, because modules may have registries of their own, and a fixture of the session would keep the first one.
@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Callable[..., TinyTarget]:
    """tiny_target(family, **sizes): by the adapter's name, made once for each in a module."""

    @cache
    def make(family: str, **sizes: int) -> TinyTarget:
        if family not in TINY:
            pytest.fail(f"no tiny target of the family {family!r}: add its model type and config to TINY in {__file__}")
        model_type, more = TINY[family]
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**SIZES, **more, **sizes})
        where = tmp_path_factory.mktemp(family)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(where)
        adapter = open_adapter(where, registry=registry, draft_layer=OWN_LAYER)
        return TinyTarget(
            where=where, adapter=adapter, model=load_target(adapter, where, dtype=torch.float32, device="cpu")
        )

    return make


@pytest.fixture(scope="module")
def tiny_draft(registry: Registry) -> Callable[..., DraftModel]:
    """tiny_draft(algorithm, target, **options): new weights, the target's embedding and head; taps 1 to 4 and -1.

    Of the sizes below an algorithm takes those it has options for.
    """
    small = {"block_size": 4, "ttt_length": 4, "num_anchors": 12}

    def make(algorithm: str, target: TinyTarget, **chosen: Any) -> DraftModel:
        spec = registry.get("draft", algorithm)
        vocab_size = target.adapter.architecture.vocab_size
        given = {**small, "mask_token_id": vocab_size - 1, **chosen}
        options = None
        if spec.options is not None:
            known = {field.name for field in fields(spec.options)}
            options = spec.options(**{name: value for name, value in given.items() if name in known})
        torch.manual_seed(1)
        draft: DraftModel = registry.load("draft", algorithm)(options, target.adapter, (-1, 1, 2, 3, 4))
        draft.adopt(target.model.embedding_weight(), target.model.head_weight())
        return draft

    return make
