"""Accepted length by the length of the context, of drafts with and without a window, and with rotary parameters of
their own: equal data and steps, contexts up to the target's last position.

    python tests/benchmarks/context_length.py --output runs/context [--seeds 42 43] [--only ...] [--chains 24]

The drafts train as the quickstart's do, on samples of at most 384 tokens. They then decode conversations of many
held-out questions, which the target answered greedily one after another until its positions end. Every question of a
conversation is one prompt, with all before it as its context (an evaluation task asks first questions only). Finished
runs are kept. Writes context_length.json and prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import deepspec_core as ds
from deepspec_core.plugins.discovery import load_plugins

sys.path.insert(0, str(Path(__file__).parent))
from drafters import QUICKSTART, run, share

TARGET = "builtin:tiny-qwen3"
YARN = 'draft.layer.rope={rope_type="yarn",factor=4.0,original_max_position_embeddings=256}'
# Name -> (run file, overrides).
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dflash": ("dflash.toml", ()),
    "dflash, window 64": ("dflash.toml", ("draft.layer.window=64",)),
    "dflash, window 256": ("dflash.toml", ("draft.layer.window=256",)),
    "dflash, yarn": ("dflash.toml", (YARN,)),
    "eagle3": ("eagle3.toml", ()),
    "eagle3, window 64": ("eagle3.toml", ("draft.layer.window=64",)),
    "eagle3, window 256": ("eagle3.toml", ("draft.layer.window=256",)),
    "eagle3, yarn": ("eagle3.toml", (YARN,)),
}
ANSWER, BATCH, SPAN = 96, 16, 128
POSITIONS = 1024  # the target's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--chains", type=int, default=24, help="conversations the drafts are evaluated on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    output = options.output.resolve()
    target = ds.load_target(TARGET)
    prompts = chains(target, options.chains)
    plain = [one.ids for one in ds.generate(target, None, prompts, max_new_tokens=ANSWER, batch_size=BATCH)]
    runs = []
    for seed in options.seeds:
        first: Path | None = None
        for name in options.only:
            run_file, overrides = CONFIGURATIONS[name]
            folder = output / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            if first is not None:
                share(first, folder)
            first = first or folder
            settings = [
                f'run.output="{folder}"',
                f"run.seed={seed}",
                f"run.threads={options.threads}",
                'run.stages=["regenerate","cache","train"]',
                *overrides,
                *options.overrides,
            ]
            run(QUICKSTART / run_file, settings)
            draft = ds.load_draft(folder / "draft", target=target)
            found = list(ds.generate(target, draft, prompts, max_new_tokens=ANSWER, batch_size=BATCH))
            runs.append(
                {
                    "configuration": name,
                    "seed": seed,
                    "prompts": len(prompts),
                    "different_outputs": sum(one.ids != ids for one, ids in zip(found, plain, strict=True)),
                    "by_context": by_context(found),
                }
            )
    (output / "context_length.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(table(runs))


def chains(target: Any, count: int) -> list[list[dict[str, str]]]:
    """A prompt for every question of `count` conversations, each as long as the target's positions allow."""
    questions = held_out_questions()
    going_on = [[next(questions)] for _ in range(count)]
    prompts: list[list[dict[str, str]]] = []
    while going_on:
        prompts += going_on
        answers = ds.generate(target, None, going_on, max_new_tokens=ANSWER, batch_size=BATCH)
        going_on = [
            [*messages, {"role": "assistant", "content": answer.text}, next(questions)]
            for messages, answer in zip(going_on, answers, strict=True)
            if len(answer.prompt_ids) + 2 * ANSWER < POSITIONS
        ]
    return prompts


def held_out_questions() -> Any:
    """First questions of the built-in prompts that no run trains on, in their order, as messages."""
    rows = load_plugins().registry.load("builtin", "tiny-dialogues")(split="held_out", seed=7)
    return (next(m for m in row["messages"] if m["role"] == "user") for row in islice(rows, 100_000))


def by_context(found: list[Any]) -> list[dict[str, float]]:
    """Rounds and accepted length where a round begins with so many tokens, by SPAN."""
    committed: dict[int, list[int]] = {}
    for one in found:
        context = len(one.prompt_ids) + 1
        for turn in one.rounds:
            committed.setdefault(context // SPAN, []).append(turn.committed)
            context += turn.committed
    return [
        {"start": span * SPAN, "rounds": len(lengths), "accepted_length": mean(lengths)}
        for span, lengths in sorted(committed.items())
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """Accepted length by context, mean over seeds."""
    starts = sorted({one["start"] for record in runs for one in record["by_context"]})
    lines = [f"| drafter | {' | '.join(f'{start} to {start + SPAN - 1}' for start in starts)} |"]
    lines.append(f"|---|{'---|' * len(starts)}")
    for name in dict.fromkeys(record["configuration"] for record in runs):
        of_name = [one for record in runs if record["configuration"] == name for one in record["by_context"]]
        lengths = [[one["accepted_length"] for one in of_name if one["start"] == start] for start in starts]
        lines.append(f"| {name} | {' | '.join(f'{mean(of_span):.3f}' if of_span else '' for of_span in lengths)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
