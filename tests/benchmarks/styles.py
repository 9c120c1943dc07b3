"""Accepted length of drafts in the target's own style beside drafts in another family's, `[draft.layer] style`.

    python tests/benchmarks/styles.py --output runs/styles [--seeds 42] [--only eagle3 eagle3-llama]

The target is the quickstart's, of Qwen3's family, because no other trained one comes with the project; so the other
style is Llama's. Within a seed, answers, features, steps and first seed are the same: the first run regenerates and
caches, and the others take its answers and features. Eagle3 taps three layers and has one layer, so that llama.cpp can
serve the drafts in Llama's style. Finished runs are kept, and an interrupted one goes on where it was. Writes
styles.json after each run, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dflash2 import finished, folder_of, is_cached, of_all_seeds
from drafters import QUICKSTART, run, share, tables

LLAMA = 'draft.layer.style="llama"'
# Name -> (run file, overrides).
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "eagle3": ("eagle3.toml", ()),
    "eagle3-llama": ("eagle3.toml", (LLAMA,)),
    "dflash": ("dflash.toml", ()),
    "dflash-llama": ("dflash.toml", (LLAMA,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--conversations", type=int, default=2500)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts each run is evaluated on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    output = options.output.resolve()
    for seed in options.seeds:
        for name in options.only:
            run_file, overrides = CONFIGURATIONS[name]
            folder = folder_of(output, name, seed)
            shared = [other for one in CONFIGURATIONS if is_cached(other := folder_of(output, one, seed))]
            if shared and folder not in shared:
                share(shared[0], folder)
            settings = [
                f'run.output="{folder}"',
                f"run.seed={seed}",
                f"run.threads={options.threads}",
                "target.layers=[2, 6, 10]",
                f'data.sources=[{{path="builtin:tiny-dialogues", limit={options.conversations}}}]',
                f"evaluate.limit={options.prompts}",
                "evaluate.plain=false",
            ]
            run(QUICKSTART / run_file, [*settings, *overrides, *options.overrides])
            runs = finished(output, CONFIGURATIONS)
            (output / "styles.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(tables(of_all_seeds(runs)))


if __name__ == "__main__":
    main()
