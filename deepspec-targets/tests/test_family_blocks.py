"""What drafts are built from, in every family: blocks equal to the target's layers, shapes, config.json, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import asdict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec_core.checkpoints.published import layer_names, published_name
from deepspec_core.contracts.target import SpecialTokens, TargetAdapter
from deepspec_core.errors import TargetError
from deepspec_core.families.adapter import FamilyAdapter
from deepspec_core.families.masks import MaskBuilder
from deepspec_core.families.transformers_target import TransformersTarget
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry

PARITY = Path(__file__).parents[2] / "tests" / "parity"
SIZES = LayerOptions(intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=12)


def open_family(family: Any, registry: Registry, layer: LayerOptions | None = None, **changes: Any) -> FamilyAdapter:
    config = family.config_class(**family.settings | changes)
    adapter: FamilyAdapter = registry.load("target", family.adapter)(config, layer or family.layer)
    return adapter


def published_layer(adapter: FamilyAdapter, width: int | None = None) -> tuple[DraftLayer, dict[str, Tensor]]:
    """A draft layer, and its tensors under the names they have in a target's layer."""
    layer = DraftLayer(adapter, width)
    holder = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    names = layer_names([layer])
    return layer, {
        published_name(name, names).removeprefix("layers.0."): tensor for name, tensor in holder.state_dict().items()
    }


def test_it_is_a_target_adapter_that_supports_its_targets(family: Any, adapter: FamilyAdapter) -> None:
    assert isinstance(adapter, TargetAdapter)
    assert adapter.unsupported() is None
    architecture = adapter.architecture
    assert (architecture.model_type, architecture.num_layers, architecture.vocab_size) == (
        family.config_class.model_type, 6, 61,
    )  # fmt: skip
    assert (architecture.stop_token_ids, architecture.pad_token_id, architecture.mask_token_id) == ((1,), 0, None)


def test_the_embedding_and_final_norm_are_the_targets(family: Any, adapter: FamilyAdapter) -> None:
    model = family.model()
    target = TransformersTarget(model, adapter.architecture)
    embedding, norm = adapter.embedding(), adapter.norm()
    embedding.weight = nn.Parameter(target.embedding_weight())
    norm.load_state_dict(model.model.norm.state_dict())
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        features = target.features(ids, torch.ones(1, 10), None, None, (-1,))
        torch.testing.assert_close(embedding(ids), features.hidden)
        kept: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        last = target.features(ids, torch.ones(1, 10), None, None, ()).last_hidden
        handle.remove()
        torch.testing.assert_close(norm(kept[0]), last)


def test_new_weights_start_as_published(adapter: FamilyAdapter) -> None:
    torch.manual_seed(0)
    layer, _ = published_layer(adapter, 64)
    embedding = adapter.embedding()
    matrices = [parameter.detach() for parameter in [*layer.parameters(), embedding.weight] if parameter.dim() == 2]
    assert len(matrices) in (7, 8)
    for weight in matrices:
        assert abs(float(weight.std()) - 0.1) < 0.02
    x = torch.randn(4, 32)
    torch.testing.assert_close(adapter.norm()(x), adapter.norm(scale=False)(x))
    assert not list(adapter.norm(scale=False).parameters())


@pytest.mark.parametrize("layer", [None, SIZES], ids=["targets-shape", "own-shape"])
def test_transformers_reads_the_config_back_and_builds_the_blocks_shapes(
    family: Any, registry: Registry, layer: LayerOptions | None, tmp_path: Path
) -> None:
    adapter = open_family(family, registry, layer)
    adapter.draft_config(2, {"block_size": 7, "architectures": ["SomeDraft"]}).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.num_hidden_layers, read.tie_word_embeddings, read.block_size) == (2, False, 7)
    assert MaskBuilder(read, torch.float32).window is None, "draft layers do not slide"
    model = AutoModelForCausalLM.from_config(read)
    assert type(model).__name__ == f"{adapter.class_prefix}ForCausalLM" or "Unified" in type(model).__name__
    _, tensors = published_layer(adapter)
    for theirs in model.model.layers:
        shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in tensors.items()}
    heads, kv_heads, head_dim = adapter.attention_heads()
    assert model.model.layers[0].self_attn.scaling == adapter.attention_projections(32).scale
    if layer is not None:
        assert (heads, kv_heads, head_dim) == (2, 1, 12)
        assert tensors["mlp.gate_proj.weight"].shape == (24, 32)
    assert adapter.rotary()(torch.zeros(1), torch.arange(5)[None])[0].shape == (1, 5, head_dim)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_moe", "4 experts a layer"),
        ("gemma4-experts", "enable_moe_block"),
        ("gemma4-per-layer-inputs", "hidden_size_per_layer_input"),
    ],
)
def test_a_target_that_is_not_dense_needs_the_drafts_own_shape(
    name: str, reason: str, families: Any, registry: Registry
) -> None:
    family = families[name]
    for layer in (LayerOptions(), LayerOptions(num_heads=2)):
        said = open_family(family, registry, layer).unsupported()
        assert said is not None
        assert reason in said
        assert "intermediate_size in [draft.layer]" in said
    assert open_family(family, registry, LayerOptions(intermediate_size=24)).unsupported() is None


@pytest.mark.parametrize(("name", "value"), [("gemma3", True), ("gemma4", "all")])
def test_targets_that_look_ahead_are_refused(name: str, value: Any, families: Any, registry: Registry) -> None:
    said = open_family(families[name], registry, use_bidirectional_attention=value).unsupported()
    assert said is not None
    assert "use_bidirectional_attention" in said


def test_text_of_a_model_whose_images_look_ahead_is_fine(families: Any, registry: Registry) -> None:
    assert open_family(families["gemma4"], registry, use_bidirectional_attention="vision").unsupported() is None


def test_heads_that_do_not_go_together_are_told(family: Any, registry: Registry) -> None:
    odd = LayerOptions(**asdict(SIZES) | {"num_heads": 4, "num_kv_heads": 3})
    said = open_family(family, registry, odd).unsupported()
    assert said is not None
    assert "4 attention heads cannot share 3" in said


def test_sizes_the_familys_config_refuses_are_a_users_error(families: Any, registry: Registry) -> None:
    with pytest.raises(TargetError, match=r"(?s)cannot have these sizes.*\[draft\.layer\].*32"):
        open_family(families["llama"], registry, LayerOptions(num_heads=3, num_kv_heads=3))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_published_gemma4_draft_config_is_reproduced(registry: Registry, tmp_path: Path) -> None:
    published = read(PARITY / "gemma4-dflash" / "draft" / "config.json")
    config = AutoConfig.from_pretrained(PARITY / "gemma4-target")
    by_family = {"target_model_type", "target_text_model_type"}
    target = read(PARITY / "gemma4-target" / "config.json")["text_config"]
    extra = {key: value for key, value in published.items() if key not in target.keys() | by_family}
    assert "target_layer_ids" in extra
    registry.load("target", "gemma4")(config).draft_config(2, extra).save_pretrained(tmp_path)
    written = read(tmp_path / "config.json")
    for by_caller in ("architectures", "transformers_version"):
        written.pop(by_caller, None)
        published.pop(by_caller)
    # What transformers 5.10 adds to rope parameters by layer type when it reads what it wrote; no one needs it.
    assert [published["rope_parameters"].pop(key) for key in ("rope_theta", "rope_type")] == [None, "default"]
    assert written == published
    assert type(AutoConfig.from_pretrained(PARITY / "gemma4-dflash" / "draft")).__name__ == "Gemma4TextConfig"


def test_a_mask_token_is_the_tokenizers_or_an_id_no_text_uses(families: Any, registry: Registry) -> None:
    for name, vocabulary, spare in (
        ("qwen3", 151936, 151669), ("qwen2", 152064, 151669), ("qwen3_moe", 151936, 151669), ("llama", 128256, 128002),
        ("llama", 49152, None), ("mistral", 32768, None), ("gemma3", 262144, None),
    ):  # fmt: skip
        config = families[name].config_class(**families[name].settings | {"vocab_size": vocabulary})
        build = registry.load("target", families[name].adapter)
        assert build(config, None).architecture.mask_token_id == spare
        tokens = SpecialTokens(stop=(1,), pad=0, mask=4)
        assert build(config, None, tokens).architecture.mask_token_id == 4


@pytest.mark.parametrize(
    ("name", "start", "ends", "sampling"),
    [
        ("qwen2", "<|im_start|>assistant\n", ("<|im_end|>",), (0.7, 0.8, 20)),
        ("qwen3_moe", "<|im_start|>assistant\n", ("<|im_end|>",), (0.7, 0.8, 20)),
        ("llama", "<|im_start|>assistant\n", ("<|im_end|>",), (0.6, 0.9, 0)),
        ("mistral", "[/INST]", ("</s>",), (0.7, 1.0, 0)),
        ("gemma3", "<start_of_turn>model\n", ("<end_of_turn>",), (1.0, 0.95, 64)),
        ("gemma4", "<|turn>model\n", ("<turn|>", "<|tool_response>"), (1.0, 0.95, 64)),
    ],
)
def test_where_the_assistant_speaks(
    name: str, start: str, ends: tuple[str, ...], sampling: tuple[float, float, int], families: Any, registry: Registry
) -> None:
    format = open_family(families[name], registry).conversation_format()
    assert (format.assistant_start, format.assistant_ends) == (start, ends)
    assert (format.sampling.temperature, format.sampling.top_p, format.sampling.top_k) == sampling


def test_llama_3_speaks_between_headers(families: Any, registry: Registry) -> None:
    format = open_family(families["llama"], registry, vocab_size=128256).conversation_format()
    assert format.assistant_start == "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert format.assistant_ends == ("<|eot_id|>", "<|eom_id|>")


class Packed(nn.Linear):
    """A head that keeps codes and knows how to undo them, as quantised layers do."""

    def __init__(self, plain: Tensor, knows: bool) -> None:
        super().__init__(plain.shape[1], plain.shape[0], bias=False)
        self.plain = plain
        self.weight = nn.Parameter(torch.zeros(plain.shape, dtype=torch.int8), requires_grad=False)
        if knows:
            self.__class__ = Unpackable


class Unpackable(Packed):
    def dequantize(self) -> Tensor:
        return self.plain


class Codes(Tensor):
    """A tensor subclass that says it is floating point and is not plain, as some quantisers use."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor) * 2


def test_quantised_heads_are_dequantised_for_drafts(families: Any, registry: Registry) -> None:
    family = families["llama"]
    target = TransformersTarget(family.model(), open_family(family, registry).architecture)
    plain = torch.randn(61, 32)
    target.head = Packed(plain, knows=True)
    assert torch.equal(target.head_weight(), plain)
    target.head = nn.Linear(32, 61, bias=False)
    target.head.weight = nn.Parameter(plain.as_subclass(Codes), requires_grad=False)
    assert type(target.head_weight()) is Tensor
    assert torch.equal(target.head_weight(), plain * 2)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_that_nothing_undoes_are_refused(dtype: torch.dtype, families: Any, registry: Registry) -> None:
    family = families["llama"]
    target = TransformersTarget(family.model(), open_family(family, registry).architecture)
    target.head = Packed(torch.zeros(61, 32), knows=False)
    target.head.weight = nn.Parameter(torch.zeros(61, 32).to(dtype), requires_grad=False)
    with pytest.raises(TargetError, match="quantised and cannot be dequantised"):
        target.head_weight()
