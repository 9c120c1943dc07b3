"""Item 6: what `deepspec estimate` says of memory, beside the peak that training has.

    python tests/benchmarks/gpu/estimate.py --output runs/gpu/estimate

Each drafter is trained for three steps with online features of a random target. On a GPU the peak is that of allocated
memory, on a CPU that of the process. Aim: within 10%.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from steps import REPOSITORY, Step, options_of, run

from deepspec_core.cli.main import main as deepspec

DRAFTS = {
    "dflash": 'type = "dflash"\nblock_size = 16\nnum_layers = 5\nnum_anchors = {anchors}\nmask_token_id = 7\n',
    "dspark": (
        'type = "dspark"\nblock_size = 7\nnum_layers = 5\nnum_anchors = {anchors}\nmask_token_id = 7\n'
        'markov = {{rank = 256, head = "vanilla"}}\n'
    ),
    "eagle3": 'type = "eagle3"\nttt_length = 7\n',
}
LOSSES = {"dflash": "{ce = 1.0}", "dspark": "{ce = 0.1, tv = 0.9, confidence = 1.0}", "eagle3": "{soft_ce = 1.0}"}
RUN = """
[run]
name = "memory"
output = "out"
stages = ["train"]
[target]
model = "{target}"
layers = {taps}
[data]
sources = [{{path = "rows.jsonl"}}]
max_length = {length}
held_out = 0.1
[features]
mode = "online"
[draft]
{draft}
[loss]
terms = {terms}
[train]
global_batch_size = 2
micro_batch_size = 1
max_steps = 3
precision = "bfloat16"
"""


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        return measure(Path(sys.argv[2]))
    options = options_of(__doc__)
    target, shape = options.output / "target", "tiny" if options.tiny else "4b"
    steps = [Step(name="target", arguments=["tests/benchmarks/gpu/random_target.py", str(target), shape], limit=240)]
    for name, draft in DRAFTS.items():
        folder = options.output / name
        folder.mkdir(exist_ok=True)
        text = RUN.format(
            target=target,
            taps=[1, 2] if options.tiny else [1, 9, 17, 25, 33],
            length=64 if options.tiny else 4096,
            draft=draft.format(anchors=8 if options.tiny else 512),
            terms=LOSSES[name],
        )
        (folder / "train.toml").write_text(text, encoding="utf-8")
        words = "light river stone house " * (16 if options.tiny else 1024)
        turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": words}]
        rows = [{"id": str(number), "messages": turns} for number in range(24)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        arguments = ["tests/benchmarks/gpu/estimate.py", "--measure", str(folder)]
        steps.append(
            Step(name=f"memory-{name}", arguments=arguments, limit=180, figures=lambda folder=folder: figures(folder))
        )
    return run(steps, options)


def measure(folder: Path) -> int:
    """Estimates in a process of its own, trains in this one, and writes both figures to measured.json."""
    path = folder / "train.toml"
    command = [sys.executable, "-m", "deepspec_core", "estimate", str(path), "--json"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    code = deepspec(["run", str(path), "--force", "train"])
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    estimated = json.loads(said)["memory"]["peak_bytes"]
    found = {"estimated": estimated, "measured": peak}
    (folder / "measured.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return code


def figures(folder: Path) -> dict[str, Any]:
    """Gigabytes, and their ratio."""
    found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    gigabytes = {name: value / 1e9 for name, value in found.items()}
    return {**gigabytes, "estimated over measured": found["estimated"] / found["measured"]}


if __name__ == "__main__":
    sys.exit(main())
