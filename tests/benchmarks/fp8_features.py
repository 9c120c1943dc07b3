"""What features in eight bits cost in accepted length: the quickstart on bfloat16 and on float8_e4m3, several seeds.

    python tests/benchmarks/fp8_features.py --output runs/fp8 [--seeds 42 43 44] [--drafters dflash eagle3]

For each seed one run regenerates; the other takes its answers. Each caches its own features and trains from the same
first weights in the same order. Finished stages are kept, so an interrupted benchmark goes on where it was. Writes
fp8_features.json: accepted lengths side by side with their differences, and the caches' bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from drafters import QUICKSTART, figures, run, share

DTYPES = ("bfloat16", "float8_e4m3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--drafters", nargs="+", choices=("dflash", "dspark", "eagle3"), default=["dflash"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts each run is evaluated on")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        answered: Path | None = None
        for drafter in options.drafters:
            for dtype in DTYPES:
                folder = options.output.resolve() / f"{drafter}-{dtype}-seed{seed}"
                if answered is not None:
                    share(answered, folder, stages=("regenerate",))
                answered = answered or folder
                settings = [
                    f'run.output="{folder}"',
                    f"run.seed={seed}",
                    f"run.threads={options.threads}",
                    f'cache.dtype="{dtype}"',
                    f"evaluate.limit={options.prompts}",
                    # Only accepted lengths are compared.
                    "evaluate.plain=false",
                    *options.overrides,
                ]
                run(QUICKSTART / f"{drafter}.toml", settings)
                cached = json.loads((folder / "cache" / "stage.json").read_text(encoding="utf-8"))["summary"]
                found = {"cache_bytes": cached["bytes"], "cache_tokens": cached["tokens"], **figures(folder)}
                runs.append({"drafter": drafter, "dtype": dtype, "seed": seed, **found})
    result = {"overrides": options.overrides, "compared": compared(runs), "runs": runs}
    out = options.output / "fp8_features.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["compared"], indent=1))


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By drafter and temperature: the accepted lengths of each seed on both, and the mean of their differences."""
    rows = []
    for drafter in dict.fromkeys(one["drafter"] for one in runs):
        of_drafter = [one for one in runs if one["drafter"] == drafter]
        for index, result in enumerate(of_drafter[0]["results"]):
            lengths = {
                dtype: [one["results"][index]["acceptance_length"] for one in of_drafter if one["dtype"] == dtype]
                for dtype in DTYPES
            }
            wide, narrow = (lengths[dtype] for dtype in DTYPES)
            difference = statistics.mean(b - a for a, b in zip(wide, narrow, strict=True))
            rows.append(
                {"drafter": drafter, "temperature": result["temperature"], **lengths, "mean difference": difference}
            )
    return rows


if __name__ == "__main__":
    main()
