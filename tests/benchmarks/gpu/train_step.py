"""Item 3: a training step at 0.6 B, 4 B and 8 B shapes beside an honest baseline and its products (../train_step.py).

    python tests/benchmarks/gpu/train_step.py --output runs/gpu/train-step

Aim for DSpark at 4 B shapes, T 4,096 and 512 anchors: 54 ms, and a quarter of the baseline's memory beyond weights,
gradients and optimizer state.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steps import Step, options_of, run

# Hidden size, MLP width, heads, key and value heads, head size, vocabulary.
SHAPES = {
    "4b": (2560, 9728, 32, 8, 128, 151_936),
    "0.6b": (1024, 3072, 16, 8, 128, 151_936),
    "8b": (4096, 12_288, 32, 8, 128, 151_936),
    "tiny": (32, 64, 2, 1, 16, 512),
}
NAMES = ("hidden", "intermediate", "heads", "kv-heads", "head-dim", "vocab")
# Drafter, shape, tokens, anchors, ways. The aim's case comes first.
CASES = (
    ("dspark", "4b", 4096, 512, ("baseline", "step", "products")),
    ("dflash", "4b", 4096, 512, ("baseline", "step", "products")),
    ("eagle3", "4b", 4096, 512, ("step", "products")),
    ("dspark", "4b", 1024, 512, ("step", "products")),
    ("dspark", "0.6b", 4096, 512, ("step", "products")),
    ("dspark", "8b", 4096, 512, ("step", "products")),
    ("dspark", "4b", 32_768, 512, ("step",)),
)


def main() -> int:
    options = options_of(__doc__)
    cases = [("dspark", "tiny", 32, 4, ("baseline", "step", "products"))] if options.tiny else CASES
    steps = []
    for drafter, shape, tokens, anchors, ways in cases:
        name = f"{drafter}-{shape}-{tokens}"
        made = options.output / f"{name}-figures.json"
        arguments = ["tests/benchmarks/train_step.py", "--device", options.device, "--drafters", drafter]
        arguments += ["--tokens", str(tokens), "--anchors", str(anchors), "--ways", *ways, "--output", str(made)]
        arguments += ["--turns", "1" if options.tiny else "5"]
        for key, value in zip(NAMES, SHAPES[shape], strict=True):
            arguments += [f"--{key}", str(value)]
        steps.append(Step(name=name, arguments=arguments, limit=180, figures=lambda made=made: figures(made)))
    return run(steps, options)


def figures(path: Path) -> dict[str, Any]:
    """Milliseconds of each way by the wall, and of the step its speed and its memory beside the baseline's."""
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    ways = result["ways"]
    found: dict[str, Any] = {f"{way} ms": 1e3 * one["seconds"] for way, one in ways.items()}
    found["TFLOP/s"] = result["flops"] / ways["step"]["seconds"] / 1e12
    if "baseline" in ways:
        found["memory of the baseline's"] = ways["step"]["beyond_bytes"] / ways["baseline"]["beyond_bytes"]
    return found


if __name__ == "__main__":
    sys.exit(main())
