"""Accepted length and time a round of trees of several sizes beside chains: the quickstart's DFlash and DSpark drafts.

    python tests/benchmarks/trees.py --output runs/trees [--prompts 40] [--nodes 8 16 32 64]

Trains both drafts as the quickstart does (finished runs are kept) and decodes held-out prompts, one sequence at a time,
with chains and with trees. Groups of prompts take turns: each group is decoded in every way, one right after the other,
so that all ways run under the same load of the machine. Times are medians over the groups, and so is the ratio of a
way's time a token to the chain's of the same group. At temperature 0 every output is compared with plain decoding.
Writes trees.json and prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import deepspec_core as ds
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Clock, Request, decode
from deepspec_core.interface.prompts import PromptReader
from deepspec_core.pipeline import threads
from deepspec_core.pipeline.machine import machine_of

sys.path.insert(0, str(Path(__file__).parent))
from context_length import held_out_questions
from drafters import QUICKSTART, run, share

TARGET, DRAFTS, ANSWER, GROUPS = "builtin:tiny-qwen3", ("dflash", "dspark"), 128, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    output = options.output.resolve()
    for name in DRAFTS:
        if name != DRAFTS[0]:
            share(output / DRAFTS[0], output / name)
        settings = [f'run.output="{output / name}"', 'run.stages=["regenerate","cache","train"]', *options.overrides]
        run(QUICKSTART / f"{name}.toml", settings)
    target = ds.load_target(TARGET)
    reader = PromptReader(target, False, None)
    questions = list(islice(held_out_questions(), options.prompts))
    requests = [
        Request(id=str(index), prompt_ids=reader.ids([question], "prompt"), seed=index)
        for index, question in enumerate(questions)
    ]
    made_by = commit()
    with threads.using(threads.for_decoding(target.architecture, target.model.device, batch_size=1)):
        machine = machine_of(target.model.device)
        figures = [
            figure
            for name in DRAFTS
            for temperature in options.temperatures
            for figure in compared(target, output / name / "draft", name, temperature, options.nodes, requests)
        ]
    report = {
        "commit": made_by,
        "machine": machine,
        "settings": {"target": TARGET, "prompts": len(requests), "max_new_tokens": ANSWER, "groups": GROUPS},
        "figures": figures,
    }
    (output / "trees.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(figures))


def compared(
    target: Any, where: Path, name: str, temperature: float, nodes: list[int], requests: list[Request]
) -> list[dict[str, Any]]:
    """A record for the chain and each size of tree; the first is the chain's."""
    sizes = [None, *nodes]
    proposers = [ds.load_draft(where, target, tree_nodes=size).proposer() for size in sizes]
    for proposer in proposers:  # first calls pay for memory and the choice of kernels
        decoded(target, proposer, requests[:1], temperature)
    groups: list[list[dict[str, float]]] = [[] for _ in sizes]
    different = [0 for _ in sizes]
    count = -(-len(requests) // GROUPS)
    for start in range(0, len(requests), count):
        group = requests[start : start + count]
        plain, _ = decoded(target, None, group, temperature)
        for index, proposer in enumerate(proposers):
            found, figures = decoded(target, proposer, group, temperature)
            groups[index].append(figures)
            different[index] += sum(found[one] != plain[one] for one in plain)
    return [
        {
            "draft": name,
            "temperature": temperature,
            "nodes": size,
            "rounds": sum(one["rounds"] for one in own),
            "accepted_length": sum(one["committed"] for one in own) / sum(one["rounds"] for one in own),
            "tokens_proposed": sum(one["proposed"] for one in own) / sum(one["rounds"] for one in own),
            "milliseconds": {
                part: 1000 * statistics.median(one[part] / one["rounds"] for one in own)
                for part in ("round", "draft", "verify", "host")
            },
            "milliseconds_a_token": 1000 * statistics.median(one["round"] / one["committed"] for one in own),
            "of_the_chain": statistics.median(
                one["round"] / one["committed"] / (chain["round"] / chain["committed"])
                for one, chain in zip(own, groups[0], strict=True)
            ),
            "different_greedy_outputs": differing if temperature == 0 else None,
        }
        for size, own, differing in zip(sizes, groups, different, strict=True)
    ]


def decoded(
    target: Any, proposer: Any, requests: list[Request], temperature: float
) -> tuple[dict[str, tuple[int, ...]], dict[str, float]]:
    """The outputs, and counts and seconds of the rounds. Prefill is left out."""
    clock = Clock()
    found = list(
        decode(
            target.model,
            proposer,
            requests,
            sampling=Sampling(temperature=temperature),
            stop_ids=target.architecture.stop_token_ids,
            max_new_tokens=ANSWER,
            batch_size=1,
            max_length=max(len(one.prompt_ids) for one in requests) + ANSWER,
            clock=clock,
        )
    )
    rounds = [one for completion in found for one in completion.rounds]
    return {completion.id: completion.output_ids for completion in found}, {
        "rounds": len(rounds),
        "committed": sum(one.acceptance_length for one in rounds),
        "proposed": sum(one.proposal_length if one.nodes is None else one.nodes for one in rounds),
        "round": clock.wall - clock.prefill,
        "draft": clock.draft,
        "verify": clock.verify,
        "host": clock.host,
    }


def commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def table(figures: list[dict[str, Any]]) -> str:
    """One line each, and the time a token beside the chain's."""
    lines = [
        "| draft | T | proposes | accepted length | ms a round | draft | verify | host | ms a token | of the chain |",
        f"|{'---|' * 10}",
    ]
    for one in figures:
        what = "a chain" if one["nodes"] is None else f"a tree of {one['nodes']}"
        cells = [
            one["draft"],
            f"{one['temperature']:g}",
            what,
            f"{one['accepted_length']:.3f}",
            *(f"{one['milliseconds'][part]:.1f}" for part in ("round", "draft", "verify", "host")),
            f"{one['milliseconds_a_token']:.2f}",
            f"{one['of_the_chain']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
