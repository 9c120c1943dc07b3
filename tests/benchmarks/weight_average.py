"""Does an exponential moving average of a draft's weights decode better than the weights, at equal steps?

    python tests/benchmarks/weight_average.py --output runs/average [--drafts dflash dspark] [--seeds 42 43 44]

The quickstart's drafts, trained for a number of steps on its target. A hook after every optimizer step keeps one
average for each decay, avg = decay * avg + (1 - decay) * weights, so all are averages of one training. All decode the
same held-out prompts greedily at the last step, where the learning rate has fallen to 0, and at the middle of the
schedule, where it has not. Seeds share answers and features and differ in first weights and in the order of samples.
Writes weight_average.json and prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import deepspec_core as ds

sys.path.insert(0, str(Path(__file__).parent))
from context_length import TARGET, held_out_questions
from drafters import QUICKSTART

DECAYS = (0.9, 0.98)
NEW_TOKENS, BATCH = 64, 32


class Averages:
    """The averages of every decay, and copies of them and of the weights at two steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.step = at, 0
        self.averages: dict[float, list[torch.Tensor]] = {}
        self.kept: dict[int, dict[str, list[torch.Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for decay in DECAYS:
            average = self.averages.setdefault(decay, [weight.clone() for weight in weights])
            torch._foreach_lerp_(average, weights, 1 - decay)
        self.step += 1
        if self.step in self.at:
            found = {"weights": weights, **{f"decay {decay:g}": self.averages[decay] for decay in DECAYS}}
            self.kept[self.step] = {name: [one.clone() for one in tensors] for name, tensors in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--drafts", nargs="+", default=["dflash"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--conversations", type=int, default=600)
    options = parser.parse_args()
    output = options.output.resolve()
    torch.set_num_threads(1)
    target = ds.load_target(TARGET)
    questions = held_out_questions()
    prompts = [[next(questions)] for _ in range(options.prompts)]
    rows = []
    for name in options.drafts:
        for seed in options.seeds:
            middle = options.steps // 2
            averages = Averages((middle, options.steps))
            hook = register_optimizer_step_post_hook(averages)
            draft = trained(output, name, seed, options)
            hook.remove()
            if averages.step != options.steps:
                sys.exit(f"{name}, seed {seed}: {averages.step} steps; remove the run's folder and start again")
            opened = ds.load_draft(draft, target=target)
            own = [weight for weight in opened.model.parameters() if weight.requires_grad]
            for step, found in averages.kept.items():
                for what, tensors in found.items():
                    with torch.no_grad():
                        for weight, tensor in zip(own, tensors, strict=True):
                            weight.copy_(tensor)
                    length = accepted_length(target, opened, prompts)
                    rows.append({"draft": name, "seed": seed, "step": step, "weights": what, "length": length})
                    print(rows[-1], flush=True)
    (output / "weight_average.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def trained(output: Path, name: str, seed: int, options: argparse.Namespace) -> Path:
    """The finished draft of one run. The first run of a kind makes the answers and features of all."""
    file = tomllib.loads((QUICKSTART / f"{'train' if name == 'dflash' else name}.toml").read_text(encoding="utf-8"))
    first = seed == options.seeds[0]
    file["run"] |= {"output": f"{name}-seed{seed}", "seed": seed, "threads": 1}
    file["run"]["stages"] = ["regenerate", "cache", "train"] if first else ["train"]
    file["data"]["sources"][0]["limit"] = options.conversations
    file["cache"]["path"] = f"{name}-cache"
    file["train"] |= {"max_steps": options.steps, "epochs": 1000}
    draft = ds.train(file, base=output).draft
    assert draft is not None, "the run trains one"
    return draft


def accepted_length(target: Any, draft: Any, prompts: list[Any]) -> float:
    """Tokens committed per round, over all rounds."""
    found = ds.generate(target, draft, prompts, max_new_tokens=NEW_TOKENS, batch_size=BATCH)
    rounds = [one.committed for answer in found for one in answer.rounds]
    return sum(rounds) / len(rounds)


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each draft, step and kind of weights: each seed, their mean."""
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| draft | step | weights | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean |"]
    lines.append("|---" * (len(seeds) + 4) + "|")
    for key in dict.fromkeys((row["draft"], row["step"], row["weights"]) for row in rows):
        lengths = [row["length"] for row in rows if (row["draft"], row["step"], row["weights"]) == key]
        cells = [*map(str, key), *(f"{length:.3f}" for length in lengths), f"{mean(lengths):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
