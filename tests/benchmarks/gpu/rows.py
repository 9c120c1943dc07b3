"""Item 2: the row engine beside the straightforward loss and the products alone (../rows.py), at 4 B shapes.

    python tests/benchmarks/gpu/rows.py --output runs/gpu/rows

Aims: 65% of a large product's speed over its own products, half the straightforward loss's time, 1.2 GB beyond inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steps import Step, options_of, run


def main() -> int:
    options = options_of(__doc__)
    sizes = "tiny" if options.tiny else "cuda"
    steps = []
    for case in ("dspark", "eagle3"):
        for kernels in ("auto", "compiled"):
            made = options.output / f"{case}-{kernels}-figures.json"
            arguments = ["tests/benchmarks/rows.py", "--device", options.device, "--sizes", sizes, "--cases", case]
            arguments += ["--kernels", kernels, "--output", str(made), "--turns", "1" if options.tiny else "7"]
            # The compiled kernels are the second choice: the other ways need not be measured again.
            arguments += [] if kernels == "auto" else ["--ways", "engine", "products"]
            steps.append(
                Step(name=f"{case}-{kernels}", arguments=arguments, limit=180, figures=lambda made=made: figures(made))
            )
    return run(steps, options)


def figures(path: Path) -> dict[str, Any]:
    """Of the engine: milliseconds, over the products and the straightforward loss, and megabytes beyond inputs."""
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"].values()
    ways = result["ways"]
    found: dict[str, Any] = {"ms": 1e3 * ways["engine"]["median_seconds"]}
    for other in ("products", "straightforward"):
        if other in ways:
            found[f"of {other}"] = ways["engine"]["median_seconds"] / ways[other]["median_seconds"]
    found["TFLOP/s"] = result["flops"] / ways["engine"]["median_seconds"] / 1e12
    found["MB beyond inputs"] = ways["engine"]["peak_bytes"] / 1e6
    return found


if __name__ == "__main__":
    sys.exit(main())
