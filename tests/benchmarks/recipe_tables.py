"""The tables of recipes.py: accepted lengths by row, seed, task and temperature, and how far ahead a row is.

Knows the entries of recipes.json. Does not know runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from recipe_levers import predicted

from deepspec_core.evaluation.tasks import task_name


def where(result: dict[str, Any]) -> dict[str, Any]:
    return {"tasks": [result["task"]], "temperature": result["temperature"]}


def tables(found: Sequence[dict[str, Any]], differing: Sequence[dict[str, Any]]) -> str:
    """A table for each task and temperature. Differences are those of each seed, with their intervals."""
    lines: list[str] = []
    seeds = sorted({one["seed"] for one in found})
    for index, result in enumerate(found[0]["results"]):
        lines += ["", f"{task_name(result['task'])}, temperature {result['temperature']:g}:", ""]
        heads = [*(f"seed {seed}" for seed in seeds), "mean", "ahead", *(f"ahead, seed {seed}" for seed in seeds)]
        lines += [f"| row | steps | {' | '.join(heads)} | draft ms a round | tokens a draft second | predicted |"]
        lines += [f"|---|---|{'---|' * len(heads)}---|---|---|"]
        for row in dict.fromkeys(one["row"] for one in found):
            of_row = {one["seed"]: one for one in found if one["row"] == row}
            results = {seed: one["results"][index] for seed, one in of_row.items()}
            lengths = {seed: one["acceptance_length"] for seed, one in results.items()}
            ahead = {one["seed"]: one for one in differing if one["row"] == row and where(one) == where(result)}
            cells = [str(next(iter(of_row.values()))["steps"]), *_by_seed(seeds, lengths)]
            cells += [f"{statistics.mean(lengths.values()):.3f}", _mean([one["ahead"] for one in ahead.values()])]
            cells += [_interval(ahead.get(seed)) for seed in seeds]
            seconds = statistics.median(one["draft_seconds_per_round"] for one in results.values())
            tokens = statistics.median(one["tokens_per_draft_second"] for one in results.values())
            lines.append(f"| {row} | {' | '.join(cells)} | {1e3 * seconds:.2f} | {tokens:.0f} | {predicted(row)} |")
    return "\n".join(lines)


def _by_seed(seeds: Sequence[int], values: dict[int, float]) -> Iterator[str]:
    return (f"{values[seed]:.3f}" if seed in values else "" for seed in seeds)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f}" if values else ""


def _interval(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    low, high = one["interval"]
    left = f", without {one['left_out']} prompts" if one["left_out"] else ""
    return f"{one['ahead']:+.2f} ({low:+.2f} to {high:+.2f}{left})"
