"""Item 4: the engine's rounds at 4 B shapes and batch 1, 8, 32 and 128, beside `generate` (../decode.py).

    python tests/benchmarks/gpu/decoding.py --output runs/gpu/decoding

Weights are random, so accepted lengths mean nothing. What counts is a round's time over that of reading the weights
once (`of_floor`), its parts, and the host's share.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steps import Step, options_of, run

PARTS = ("plain", "loop", "batch", "temperature")


def main() -> int:
    options = options_of(__doc__)
    target, shape = options.output / "target", "tiny" if options.tiny else "4b"
    batch = ["1", "2"] if options.tiny else ["1", "8", "32", "128"]
    steps = [Step(name="target", arguments=["tests/benchmarks/gpu/random_target.py", str(target), shape], limit=240)]
    for part in PARTS:
        made = options.output / f"{part}-figures"
        arguments = ["tests/benchmarks/decode.py", "--output", str(made), "--real", str(target), "--parts", part]
        arguments += ["--device", options.device, "--batch", *batch]
        arguments += ["--tokens", "8", "--pairs", "1"] if options.tiny else ["--tokens", "128", "--pairs", "5"]
        steps.append(
            Step(name=part, arguments=arguments, limit=200, figures=lambda made=made, part=part: figures(made, part))
        )
    return run(steps, options)


def figures(folder: Path, part: str) -> dict[str, Any]:
    """The first and last row of the part, its numbers only."""
    found = json.loads((folder / "decode.json").read_text(encoding="utf-8"))["figures"][part]
    rows = found if isinstance(found, list) else [found]
    numbers: dict[str, Any] = {}
    for row in (rows[0], rows[-1]):
        at = f"batch {row['batch']}: " if "batch" in row else ""
        numbers |= {f"{at}{name}": value for name, value in row.items() if isinstance(value, float)}
    return numbers


if __name__ == "__main__":
    sys.exit(main())
