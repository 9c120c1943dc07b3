"""Item 1: the tests that need a GPU, package by package.

python tests/benchmarks/gpu/checks.py --output runs/gpu/checks
"""

from __future__ import annotations

import sys
from pathlib import Path

from steps import Step, options_of, run

# Name -> what pytest is given, and what a try on a CPU selects of it.
TESTS = {
    "rows": ("deepspec-core/tests/test_row_kernels.py", "eager and not cuda"),
    "dflash-attention": ("deepspec-dflash/tests/test_dflash_attention.py", "window"),
    "eagle3-attention": ("deepspec-eagle3/tests/test_eagle3_attention.py", "window"),
    "on-gpu": ("tests/test_on_gpu.py", "training_step"),
    "two-workers": ("tests/test_parallel_step.py", "cpu"),
    "others": (".", "nothing-is-called-so"),
}


def main() -> int:
    options = options_of(__doc__)
    apart = [f"--ignore={path}" for path, _ in TESTS.values() if path != "."]
    steps = []
    for name, (path, few) in TESTS.items():
        chosen = ["-m", "not gpu and not slow", "-k", few] if options.tiny else ["-m", "gpu"]
        more = apart if path == "." else []
        if options.tiny and path == ".":
            chosen = ["-m", "gpu", "--collect-only"]
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", path, *chosen, *more]
        said = options.output / f"{name}.log"
        steps.append(Step(name=name, arguments=arguments, limit=240, figures=lambda said=said: last_line(said)))
    return run(steps, options)


def last_line(said: Path) -> dict[str, str]:
    """What pytest said last: how many passed."""
    lines = said.read_text(encoding="utf-8").splitlines()
    return {"tests": lines[-1].strip("= ")} if lines else {}


if __name__ == "__main__":
    sys.exit(main())
