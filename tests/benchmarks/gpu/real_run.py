"""Item 5: the drafters of the quickstart, trained three times as long, three seeds, both temperatures (../drafters.py).

    python tests/benchmarks/gpu/real_run.py --output runs/gpu/real-run

One step a seed and drafter; they share answers and features within a seed, and each run resumes where it was ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steps import BENCHMARKS, Step, options_of, run

sys.path.insert(0, str(BENCHMARKS))
from drafters import CONFIGURATIONS

SEEDS = (42, 43, 44)


def main() -> int:
    options = options_of(__doc__)
    names = ["dflash"] if options.tiny else list(CONFIGURATIONS)
    seeds = SEEDS[:1] if options.tiny else SEEDS
    steps = []
    for seed in seeds:
        for number, name in enumerate(names):
            # The first one's answers and features are shared, so it is named in every call.
            only = [names[0]] if number == 0 else [names[0], name]
            arguments = ["tests/benchmarks/drafters.py", "--output", str(options.output / "runs"), "--only", *only]
            arguments += ["--seeds", str(seed)]
            arguments += ["--set", "train.epochs=18"] if not options.tiny else [
                "--prompts", "2", "--set", "train.max_steps=2", "--set", "evaluate.max_new_tokens=8",
                "--set", 'data.sources=[{path="builtin:tiny-dialogues",limit=24}]', "--set", "regenerate.max_tokens=8",
                "--set", "train.global_batch_size=4", "--set", "train.micro_batch_size=4",
            ]  # fmt: skip
            folder = options.output / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
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
