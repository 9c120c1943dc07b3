"""`deepspec estimate`: counts what real tensors take, grows as it should, needs no weights, and says what is wrong."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from transformers import Qwen3Config

from deepspec_core.cache.estimate import too_small
from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.disk import free_bytes
from deepspec_core.estimating.memory import bytes_of, fake_tensors
from deepspec_core.estimating.process import resident_bytes
from deepspec_core.estimating.step import StepEstimate, estimate_step
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.pipeline.estimating import estimate
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.training import new_draft
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.engine import build_engine
from deepspec_core.training.host_batch import host_batch
from deepspec_core.training.optimizers import hidden_matrices
from deepspec_core.training.sampler import sample_rng

DRAFTS = {
    "dflash": ("block_size = 4\nnum_layers = 2\nnum_anchors = 12\nmask_token_id = 39", "{ce = 1.0}"),
    "dspark": (
        'block_size = 4\nnum_layers = 2\nnum_anchors = 12\nmask_token_id = 39\nmarkov = {rank = 8, head = "rnn"}',
        "{ce = 0.1, tv = 0.9, confidence = 1.0}",
    ),
    "eagle3": ("ttt_length = 4", "{soft_ce = 1.0}"),
}
FAMILIES = ("gemma3", "gemma4", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
LENGTH, TAPS, HIDDEN, VOCABULARY = 64, 2, 32, 40

MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run(target's directory, draft, KEY=VALUE...): cached features, micro-batches of 2 out of 8 sequences."""

    def make(target: Path, draft: str = "dspark", *overrides: str) -> Run:
        options, terms = DRAFTS[draft]
        path = tmp_path / "run.toml"
        path.write_text(
            f"""
            [run]
            name = "a"
            output = "out"
            stages = ["cache", "train"]
            [target]
            model = "{target}"
            layers = [1, 2]
            [data]
            sources = [{{path = "none.jsonl", limit = 30}}]
            max_length = {LENGTH}
            [features]
            mode = "cached"
            [draft]
            type = "{draft}"
            {options}
            [draft.layer]
            intermediate_size = 48
            [loss]
            terms = {terms}
            [train]
            global_batch_size = 8
            micro_batch_size = 2
            precision = "float32"
            """
        )
        plugins = load_plugins()
        return Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=path, plugins=plugins)

    return make


ONLINE = ('run.stages=["train"]', "features.mode=online")


def step_estimate(run: Run, *, fake: bool) -> StepEstimate:
    """Of a micro-batch of two samples of unlike length, on tensors with or without numbers."""
    with fake_tensors() if fake else nullcontext():
        draft = new_draft(run)
        stored = [
            TargetFeatures(hidden=torch.zeros(n, TAPS * HIDDEN), last_hidden=torch.zeros(n, HIDDEN)) for n in (64, 50)
        ]
    ids = [torch.arange(len(features.hidden)) % 40 for features in stored]
    samples = [
        Sample(id=f"{len(i)}", input_ids=i, loss_mask=i > 3, original_length=len(i), features=features)
        for i, features in zip(ids, stored, strict=True)
    ]
    prepared = [draft.preparation.prepare(sample, sample_rng(0, 0, sample.id)) for sample in samples]
    return estimate_step(
        draft=draft,
        engine=build_engine(run.file.loss, run.plugins.registry),
        batch=host_batch(prepared, draft.preparation),
        source=OnlineFeatures([], run.target.model, run.file.target.layers),
        device_type="cpu",
        compute_dtype=torch.bfloat16 if run.file.train.precision == "bfloat16" else torch.float32,
        accumulates=True,
        options=run.file.train,
    )


def test_muon_keeps_one_moment_and_its_products_are_counted(make_run: MakeRun, tiny_target: Any) -> None:
    """At H 32, with matrices [m, n], m <= n: five times a Gram matrix, its square, and both applied."""
    where = tiny_target("qwen3").where
    plain = step_estimate(make_run(where, "dflash"), fake=True)
    found = step_estimate(make_run(where, "dflash", "train.optimizer=muon"), fake=True)
    real = step_estimate(make_run(where, "dflash", "train.optimizer=muon"), fake=False)
    assert (found.held, found.flops) == (real.held, real.flops)
    assert plain.flops["update"] == 0
    assert {**found.flops, "update": 0} == plain.flops
    with fake_tensors():
        draft = new_draft(make_run(where, "dflash"))
    sides = [sorted(value.shape) for name, value in draft.named_parameters() if name in hidden_matrices(draft)]
    assert found.flops["update"] == sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
    # One moment in place of two, and no count of steps.
    assert plain.held["optimizer_moments"] - found.held["optimizer_moments"] == sum(4 * m * n + 4 for m, n in sides)


@pytest.mark.parametrize(
    ("draft", "override"),
    [
        *[(draft, f"draft.layer.intermediate_size={VOCABULARY}") for draft in DRAFTS],
        *[(draft, f"draft.vocab_size={size}") for draft in DRAFTS for size in (HIDDEN, 16)],
    ],
)
def test_a_layer_as_wide_as_a_vocabulary_is_still_muons(
    draft: str, override: str, make_run: MakeRun, tiny_target: Any
) -> None:
    """Widths of layers, and of what they read, that happen to be the draft's number of tokens or the target's."""
    where = tiny_target("qwen3").where

    def matrices(*overrides: str) -> frozenset[str]:
        run = make_run(where, draft, *overrides)
        assert (run.target.architecture.vocab_size, run.target.architecture.hidden_size) == (VOCABULARY, HIDDEN)
        with fake_tensors():
            return hidden_matrices(new_draft(run))

    found = matrices(override)
    assert found == matrices()
    assert any(name.endswith("fc.weight") for name in found)
    assert any(name.endswith("mlp.down_proj.weight") for name in found)


@pytest.mark.parametrize(
    ("draft", "precision"),
    [
        ("dflash", "float32"),
        ("dspark", "bfloat16"),
        pytest.param("eagle3", "bfloat16", marks=pytest.mark.slow),
        ("dspark", "float32"),
    ],
)
def test_tensors_without_numbers_take_what_real_ones_take(
    draft: str, precision: str, make_run: MakeRun, tiny_target: Any
) -> None:
    run = make_run(tiny_target("qwen3").where, draft, f"train.precision={precision}")
    fake, real = step_estimate(run, fake=True), step_estimate(run, fake=False)
    assert (fake.held, fake.flops, fake.rows, fake.positions) == (real.held, real.flops, real.rows, real.positions)
    # A scalar more or less: when Python lets go of one is not always the same.
    assert fake.phases == pytest.approx(real.phases, abs=64)
    assert fake.small == pytest.approx(real.small, abs=64)
    assert fake.phases["backward"] > fake.held["trained_weights"] > 0
    assert fake.flops["draft_backward"] > 1.5 * fake.flops["draft_forward"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_targets_skeleton_is_the_target_without_its_weights(family: str, tiny_target: Any) -> None:
    target = tiny_target(family)
    with fake_tensors():
        skeleton = target.adapter.skeleton(dtype=torch.bfloat16)
    real, bare = (dict(model.model.named_parameters()) for model in (target.model, skeleton))
    assert {name: weight.shape for name, weight in real.items()} == {
        name: weight.shape for name, weight in bare.items()
    }
    assert bytes_of(bare.values()) == bytes_of(real.values()) / 2
    ids = torch.zeros(2, 24, dtype=torch.long)
    features = [model.features(ids, torch.ones_like(ids), None, None, (1, 3)) for model in (target.model, skeleton)]
    assert features[0].hidden.shape == features[1].hidden.shape
    assert features[1].last_hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("draft", DRAFTS)
def test_features_online(draft: str, make_run: MakeRun, tiny_target: Any) -> None:
    target = tiny_target("gemma4")
    found = estimate(make_run(target.where, draft, *ONLINE))
    assert found.cache is None
    # Embedding and lm_head are the draft's frozen weights, and the same memory.
    shared = found.memory.held["frozen_weights"]
    assert found.memory.held["target_weights"] + shared == pytest.approx(
        bytes_of(target.model.model.parameters()), rel=0.02, abs=4096
    )
    assert found.memory.phases["features"] > 2 * LENGTH * (TAPS + 1) * HIDDEN * 4
    assert all(count > 0 for part, count in found.flops.items() if part != "update")
    assert found.not_counted == ()


def test_a_target_that_reads_numbers_is_said_not_to_be_counted(
    make_run: MakeRun, tiny_target: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny_target("qwen3")
    features = type(target.model).features

    def reading(self: Any, *args: Any) -> TargetFeatures:
        found: TargetFeatures = features(self, *args)
        assert float(found.last_hidden.max()) < 1e9
        return found

    monkeypatch.setattr(type(target.model), "features", reading)
    run = make_run(target.where, "dspark", *ONLINE)
    assert main(["estimate", str(run.path), *(part for key in ONLINE for part in ("--set", key))]) == 0
    shown = capsys.readouterr()
    assert "Not counted: the target's forward pass, which cannot run on tensors without values: " in shown.out
    assert not shown.err
    found = estimate(run)
    assert found.flops["features"] == 0
    assert found.flops["draft_forward"] > 0
    assert found.memory.held["target_weights"] > 0


def test_the_targets_share_of_the_arithmetic(make_run: MakeRun, tiny_target: Any) -> None:
    target = tiny_target("qwen3")
    found = estimate(make_run(target.where, "dspark", *ONLINE))
    decoder = target.model.decoder.layers
    products = sum(weight.numel() for weight in decoder.parameters() if weight.ndim == 2)
    # 4 heads of size 8 over all pairs of positions, scores and values.
    attention = len(decoder) * 2 * 2 * 4 * 8 * LENGTH
    # Some releases of transformers form rotary angles by a product, too: two thousand operations here.
    assert found.flops["features"] == pytest.approx(8 * LENGTH * (2 * products + attention), rel=1e-4)


def test_memory_grows_with_the_micro_batch_and_arithmetic_does_not(make_run: MakeRun, tiny_target: Any) -> None:
    where = tiny_target("qwen3").where
    small, large = (estimate(make_run(where, "dspark", f"train.micro_batch_size={size}")) for size in (2, 4))
    assert large.memory.phases["forward"] == pytest.approx(2 * small.memory.phases["forward"], rel=0.1)
    assert large.micro_batches_per_step * 2 == small.micro_batches_per_step == 4
    assert large.flops == pytest.approx(small.flops, rel=0.02)
    for name in ("trained_weights", "frozen_weights", "optimizer_moments", "gradients"):
        assert large.memory.held[name] == small.memory.held[name]


def test_what_an_optimizer_and_several_processes_hold(make_run: MakeRun, tiny_target: Any) -> None:
    run = make_run(tiny_target("qwen3").where)
    draft = new_draft(run)
    trained = [weight for weight in draft.parameters() if weight.requires_grad]
    one, four = estimate(run), estimate(run, processes=4)
    weights = 4 * sum(weight.numel() for weight in trained)
    assert one.memory.held["trained_weights"] == weights
    # AdamW counts steps for each weight, in four bytes.
    assert one.memory.held["optimizer_moments"] == 2 * weights + 4 * len(trained)
    assert one.memory.held["frozen_weights"] >= 4 * 2 * draft.lm_head.weight.numel()
    assert (one.memory.held["gradients"], one.memory.held["gradient_buckets"]) == (weights, 0)
    # A quarter of 8 sequences is one micro-batch: gradients come and go with it, and cross over in buckets.
    assert (four.micro_batches_per_step, four.memory.held["gradients"]) == (1, 0)
    assert four.memory.held["gradient_buckets"] == weights
    assert four.memory.phases["backward"] > one.memory.phases["backward"]
    assert four.flops == one.flops
    # In shards, a process has a quarter of what the optimizer holds, and gathers the weights for a step.
    run_in_shards = make_run(tiny_target("qwen3").where, "dspark", "train.parallel=fsdp")
    spread = estimate(run_in_shards, processes=4).memory.held
    assert spread["gathered_weights"] == weights
    assert spread["trained_weights"] + spread["optimizer_moments"] < 0.26 * (3 * weights) + 4 * len(trained)
    assert one.memory.peak_bytes == sum(one.memory.held.values()) + max(one.memory.phases.values())


def test_an_accelerators_memory_holds_no_libraries(make_run: MakeRun, tiny_target: Any) -> None:
    run = make_run(tiny_target("qwen3").where)
    run.target.__dict__["device"] = torch.device("cuda")
    found = estimate(run)
    assert found.device == "cuda"
    held = found.memory.held
    assert held["process"] == held["allocator"] == 0
    assert held["optimizer_moments"] > 0
    # With stored features the target's embedding and lm_head alone are loaded, which are the draft's frozen weights.
    on_cpu = estimate(make_run(tiny_target("qwen3").where)).memory.held
    assert held["target_weights"] == on_cpu["target_weights"] == 0
    assert 0 < held["frozen_weights"] <= on_cpu["frozen_weights"]
    assert held["batches"] == on_cpu["batches"]


def test_features_that_come_with_answers_are_on_disk_twice(
    make_run: MakeRun, tiny_target: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = ('run.stages=["regenerate", "cache", "train"]', "regenerate.features=true")
    served = ('regenerate.servers=["http://127.0.0.1:1/v1"]', f"features.exchange={tmp_path}")
    run = make_run(
        tiny_target("qwen3").where, "dspark", *answered, *served, 'features.servers=["http://127.0.0.1:1/v1"]'
    )
    said = estimate(run).cache
    assert said is not None
    assert said.kept_with_answers
    most = free_bytes(tmp_path) * 3 // 4
    (found,) = too_small([(tmp_path / "a" / "b", most), (tmp_path / "c", most)])
    assert found[:2] == (tmp_path / "a" / "b", 2 * most)
    assert not list(too_small([(tmp_path, most // 3), (tmp_path, most // 3)]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_the_cache_takes_as_many_bytes_as_said(dtype: str, make_run: MakeRun, tiny_target: Any, tmp_path: Path) -> None:
    run = make_run(tiny_target("qwen3").where, "dspark", f"cache.dtype={dtype}")
    said = estimate(run).cache
    assert said is not None
    assert (said.most_tokens, said.most_bytes) == (30 * LENGTH, 30 * LENGTH * said.bytes_per_token)
    cache = run.plugins.registry.load("cache", "hdf5")()
    length = 20_000
    writer = cache.create(tmp_path / "cache", evolve(run.cache.bare_header(), max_length=length))
    features = TargetFeatures(hidden=torch.zeros(length, TAPS * HIDDEN), last_hidden=torch.zeros(length, HIDDEN))
    ids = torch.zeros(length, dtype=torch.long)
    writer.write(Sample(id="a", input_ids=ids, loss_mask=ids > 0, original_length=length, features=features))
    writer.finish()
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert 0 <= size - length * said.bytes_per_token < 1.2e6  # about a MB a shard, as cache/estimate.py says


def test_unlimited_sources_leave_the_size_of_the_cache_open(make_run: MakeRun, tiny_target: Any) -> None:
    run = make_run(tiny_target("qwen3").where, "dspark", 'data.sources=[{path = "none.jsonl"}]')
    found = estimate(run).cache
    assert found is not None
    assert (found.most_tokens, found.most_bytes) == (None, None)


def test_ten_billion_parameters_are_estimated_from_a_config_alone(make_run: MakeRun, tmp_path: Path) -> None:
    target = tmp_path / "large"
    Qwen3Config(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, eos_token_id=1, tie_word_embeddings=False,
    ).save_pretrained(target)  # fmt: skip
    run = make_run(target, "eagle3", *ONLINE, "draft.layer.intermediate_size=14336", "loss.kernels=plain")
    before = resident_bytes()
    found = estimate(run)
    assert resident_bytes() - before < 1e9
    assert found.memory.held["target_weights"] + found.memory.held["frozen_weights"] > 4 * 10e9
    assert not list(target.glob("*.safetensors"))


def test_the_table_and_the_object_say_the_same(
    make_run: MakeRun, tiny_target: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_run(tiny_target("qwen3").where).path)
    assert main(["estimate", path, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.keys() == {
        "device", "processes", "micro_batch", "micro_batches_per_step", "memory", "cache", "flops_per_step",
        "not_counted",
    }  # fmt: skip
    assert said["micro_batch"].keys() == {"sequences", "tokens_per_sequence", "rows", "target_positions"}
    memory = said["memory"]
    assert memory.keys() == {"peak_bytes", "peak_phase", "held_bytes", "phase_bytes"}
    assert memory["held_bytes"].keys() == {
        "process", "allocator", "target_weights", "trained_weights", "frozen_weights", "head_copies",
        "optimizer_moments", "gradients", "gathered_weights", "gradient_buckets", "batches",
    }  # fmt: skip
    assert memory["phase_bytes"].keys() == {"features", "forward", "rows", "backward", "update"}
    assert memory["peak_bytes"] == sum(memory["held_bytes"].values()) + memory["phase_bytes"][memory["peak_phase"]]
    assert said["cache"].keys() == {"bytes_per_token", "most_tokens", "most_bytes", "kept_with_answers"}
    parts = said["flops_per_step"]
    assert parts.keys() == {"total", "features", "draft_forward", "draft_backward", "rows", "update"}
    assert parts["total"] == sum(parts.values()) / 2

    assert main(["estimate", path]) == 0
    shown = capsys.readouterr().out
    assert "A micro-batch has 2 x 64 tokens." in shown
    assert f"{said['cache']['bytes_per_token']:,} bytes a token" in shown
    assert "the loss's products with the vocabulary, forward and backward" in shown
    assert any(line.split()[1:2] == ["peak"] for line in shown.splitlines())


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("target.layers=[1, 5]", "the last decoder layer cannot be tapped"),
        ("draft.mask_token_id=40", "the mask token is not in the target's vocabulary"),
        ("target.model=./nowhere", "no such target directory"),
        ("train.micro_batch=2", "micro_batch_size"),
    ],
)
def test_what_would_stop_training_stops_the_estimate(
    override: str, problem: str, make_run: MakeRun, tiny_target: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_run(tiny_target("qwen3").where).path)
    assert main(["estimate", path, "--set", override]) == 2
    assert problem in capsys.readouterr().err
