"""What `deepspec estimate` says of memory beside what a training process really has: within 15 %, on the CPU."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory as Linux says it"),
]

BLOCKS = """
block_size = 7
num_layers = {layers}
num_anchors = 64
mask_token_id = 7
markov = {{rank = 64, head = "vanilla"}}
"""
DRAFTS = {
    "dspark": (BLOCKS, "{ce = 0.1, tv = 0.9, confidence = 1.0}"),
    "eagle3": ("ttt_length = 4\nnum_layers = {layers}\n", "{soft_ce = 1.0}"),
}
# Draft, precision, hidden size, vocabulary, layers, tokens, sequences in a micro-batch and a step; what it comes to.
CASES = {
    "small": ("dspark", "float32", 512, 32_000, 3, 512, 2, 4),  # 1.6 GB
    "large": ("dspark", "float32", 768, 48_000, 4, 1024, 4, 8),  # 3.5 GB
    "another-draft": ("eagle3", "float32", 512, 8_000, 1, 768, 4, 8),  # 2.1 GB
    "half-precision": ("dspark", "bfloat16", 768, 32_000, 4, 1024, 4, 8),  # 3.1 GB
    "one-batch-a-step": ("eagle3", "float32", 512, 8_000, 1, 768, 4, 4),  # 1.9 GB
}
STEPS = 3
PEAK = """
import sys
from pathlib import Path
from deepspec_core.cli.main import main
code = main(sys.argv[2:])
status = Path("/proc/self/status").read_text()
Path(sys.argv[1]).write_text(status.partition("VmHWM:")[2].split()[0])
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """For files that nobody wants to keep: a target, a cache, a checkpoint."""
    yield tmp_path
    for made in ("target", "cache", "out"):
        shutil.rmtree(tmp_path / made, ignore_errors=True)


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(case: str, folder: Path) -> None:
    path = _make(folder, *CASES[case])
    command = [sys.executable, "-m", "deepspec_core", "estimate", str(path), "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    peak = folder / "peak"
    subprocess.run([sys.executable, "-c", PEAK, str(peak), "run", str(path)], check=True)
    measured = int(peak.read_text()) * 1024
    estimated = said["memory"]["peak_bytes"]
    assert abs(estimated - measured) < 0.15 * measured, f"{estimated / 1e6:.0f} of {measured / 1e6:.0f} MB: {said}"
    # Not for nothing: most of it is what the step itself takes.
    assert said["memory"]["held_bytes"]["process"] < 0.45 * measured


def _make(
    folder: Path,
    draft: str,
    precision: str,
    hidden_size: int,
    vocab_size: int,
    layers: int,
    length: int,
    micro_batch: int,
    batch: int,
) -> Path:
    """A run file with a random target and a cache of random features, nothing of which any target computed."""
    options, terms = DRAFTS[draft]
    config = Qwen3Config(
        hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=4, num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 128, head_dim=64, vocab_size=vocab_size, max_position_embeddings=4096,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "target")
    tokenizer = tiny_tokenizer()  # with the markers of the target's family
    markers = tokenizer.chat_template.replace("<|start|>", "<|im_start|>").replace("<|end|>", "<|im_end|>")
    tokenizer.chat_template = markers
    tokenizer.save_pretrained(folder / "target")
    (folder / "cache").mkdir()
    path = folder / "run.toml"
    path.write_text(
        f"""
        [run]
        name = "a"
        output = "out"
        stages = ["train"]
        threads = 1
        [target]
        model = "./target"
        layers = [0, 1, 2]
        [data]
        sources = [{{path = "none.jsonl"}}]
        max_length = {length}
        [features]
        mode = "cached"
        [cache]
        path = "cache"
        [draft]
        type = "{draft}"
        {options.format(layers=layers)}
        [draft.layer]
        intermediate_size = {3 * hidden_size}
        [loss]
        terms = {terms}
        [train]
        global_batch_size = {batch}
        micro_batch_size = {micro_batch}
        epochs = {STEPS}
        max_steps = {STEPS}
        log_every = 1
        precision = "{precision}"
        """
    )
    plugins = load_plugins()
    run = Run(file=load_run_file(path, plugins=plugins), path=path, plugins=plugins)
    # The conversations belong to whoever made the cache: training does without them.
    (folder / "none.jsonl").touch()
    header = run.cache.header()
    (folder / "none.jsonl").unlink()
    (folder / "cache").rmdir()
    writer = HDF5Format().create(folder / "cache", header)
    torch.manual_seed(0)
    for number in range(batch):
        features = TargetFeatures(
            hidden=torch.randn(length, 3 * hidden_size, dtype=torch.bfloat16),
            last_hidden=torch.randn(length, hidden_size, dtype=torch.bfloat16),
        )
        ids = torch.randint(3, vocab_size, (length,))
        mask = torch.arange(length) > 0
        writer.write(Sample(id=f"{number}", input_ids=ids, loss_mask=mask, original_length=length, features=features))
    writer.finish()
    return path
