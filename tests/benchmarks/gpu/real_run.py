"""Item 5: three drafters with the published and the recommended recipe, trained three times as long (../recipes.py).

    python tests/benchmarks/gpu/real_run.py --output runs/gpu/real-run

One step a seed and row, both temperatures. Rows share answers and features within a seed, and have as many steps as
make their compute equal. Each run resumes where it was ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

from steps import Step, options_of, run

SEEDS: Final = (42, 43, 44)
ROWS: Final = ("dspark", "dspark+soft-ce+muon", "dflash", "dflash+muon", "eagle3", "eagle3+labels+muon")
# Of the reference, three times the quickstart's.
STEPS: Final = 2826


def main() -> int:
    options = options_of(__doc__)
    common = ["--steps", str(STEPS)]
    if options.tiny:
        common = ["--steps", "2", "--prompts", "2"]
        for setting in (
            "evaluate.max_new_tokens=8", 'data.sources=[{path="builtin:tiny-dialogues",limit=24}]',
            "regenerate.max_tokens=24", "train.global_batch_size=4", "train.micro_batch_size=4",
        ):  # fmt: skip
            common += ["--set", setting]
    steps = []
    for seed in SEEDS[:1] if options.tiny else SEEDS:
        for row in ROWS[:2] if options.tiny else ROWS:
            folder = options.output / "runs" / f"{row}-seed{seed}"
            arguments = ["tests/benchmarks/recipes.py", "--output", str(folder.parent), *common]
            arguments += ["--only", row, "--seeds", str(seed)]
            steps.append(
                Step(name=folder.name, arguments=arguments, limit=300, figures=lambda folder=folder: figures(folder))
            )
    return run(steps, options)


def figures(folder: Path) -> dict[str, Any]:
    """Accepted length at each temperature."""
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["results"]
    return {f"T {result['temperature']:g}": float(result["acceptance_length"]) for result in results}


if __name__ == "__main__":
    sys.exit(main())
