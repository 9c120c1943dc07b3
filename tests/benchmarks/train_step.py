"""A training step of each drafter against an honest baseline and against its matrix products alone.

    python tests/benchmarks/train_step.py                        CPU: T 512, 64 anchors, the three drafters
    python tests/benchmarks/train_step.py --tokens 512 2048 --anchors 64 256
    python tests/benchmarks/train_step.py --device cuda --hidden 2560 --intermediate 9728 --heads 32 --kv-heads 8 \
        --head-dim 128 --tokens 4096 --anchors 512

What is compared, each in a process of its own so that peaks do not mix:
    baseline   train_step_baseline.py: bf16 weights, a dense mask, all logits, losses in fp32 on them, eager
    step       this project's step: forward, loss, backward, accumulation, division, clipping, AdamW
    products   the useful products alone, each forward and backward once (train_step_case.py lists them)
Every process does one step in turn, several turns after a warm-up. A step has one micro-batch of one sequence unless
--micro-batches says more; the optimizer's part is also given alone, since it is shared by all micro-batches of a step.
Times are wall seconds and, on CPU, the process's own seconds of computing (all threads), which other processes on a
busy machine hardly change. Memory is the peak of a step less what is resident before it (weights and optimizer state)
and less the gradients; on CUDA that of allocated memory. FLOP/s counts 2 M K N for each product of the list, and again
for each gradient of it that is wanted. Writes JSON and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs
import torch
from train_step_case import ARMS, Case, new_arm, new_batch, useful

SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "vocab", "layers", "block", "rank")


def work(pipe: Connection, way: str, case: Case, threads: int, micro_batches: int) -> None:
    """One process: a step for each number it is sent, answered by its figures; None ends it."""
    torch.set_num_threads(threads)
    arm = new_arm(way, case)
    while (seed := pipe.recv()) is not None:
        batches = [new_batch(case, arm.preparation, seed * 1000 + number) for number in range(micro_batches)]
        if way == "products":
            arm.prepare(batches[0])
        flops = sum(product.flops for batch in batches for product in useful(case, batch).values())
        synchronise(case.device)
        before = resident(case.device)
        wall, own = time.perf_counter(), time.process_time()
        loss = arm.gradient(batches)
        synchronise(case.device)
        middle_wall, middle_own = time.perf_counter(), time.process_time()
        arm.update()
        synchronise(case.device)
        pipe.send(
            {
                "seconds": time.perf_counter() - wall,
                "own_seconds": time.process_time() - own,
                "update_seconds": time.perf_counter() - middle_wall,
                "update_own_seconds": time.process_time() - middle_own,
                "beyond_bytes": peak(case.device) - before - arm.kept_bytes(),
                "resident_bytes": before,
                "loss": float(loss),
                "flops": flops,
            }
        )


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def resident(device: str) -> int:
    """Bytes in use now; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # What was freed goes back to the system first, so that it is not taken for weights.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    Path("/proc/self/clear_refs").write_text("5")
    return pages * resource.getpagesize()


def peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def compare(case: Case, ways: list[str], threads: int, turns: int, micro_batches: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for way in ways:
        pipes[way], other = context.Pipe()
        process = context.Process(target=work, args=(other, way, case, threads, micro_batches), daemon=True)
        process.start()
        processes.append(process)
    # Warm-ups, one process at a time. Two: after one alone the first turn was often the longest.
    first = {way: [ask(pipes[way], seed) for seed in (1, 2)] for way in ways}
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for turn in range(turns):
        for way in ways:
            taken[way].append(ask(pipes[way], 3 + turn))
    for way in ways:
        pipes[way].send(None)
    for process in processes:
        process.join()
    losses = {way: [figures["loss"] for figures in taken[way]] for way in ways if way != "products"}
    return {
        "case": attrs.asdict(case),
        "flops": taken[ways[0]][0]["flops"],
        "losses": losses,
        "ways": {way: {**summary(taken[way]), "turns": taken[way], "warm_up": first[way]} for way in ways},
    }


def summary(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}


def ask(pipe: Connection, seed: int) -> dict[str, float]:
    pipe.send(seed)
    answer: dict[str, float] = pipe.recv()
    return answer


def table(results: list[dict[str, Any]]) -> str:
    columns = "drafter", "T", "anchors", "way", "median s", "own s", "optimizer, own s", "baseline / it, own s"
    columns += "it / products, own s", "beyond, MiB", "of the baseline's", "GFLOP / own s"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for result in results:
        case, ways = result["case"], result["ways"]
        for way, one in ways.items():
            base, floor = ways.get("baseline", one), ways.get("products", one)
            cells = (
                case["algorithm"],
                str(case["tokens"]),
                str(case["anchors"]),
                way,
                f"{one['seconds']:.2f}",
                f"{one['own_seconds']:.2f}",
                f"{one['update_own_seconds']:.2f}",
                f"{base['own_seconds'] / one['own_seconds']:.2f}",
                f"{one['own_seconds'] / floor['own_seconds']:.2f}",
                f"{one['beyond_bytes'] / 2**20:,.0f}",
                f"{one['beyond_bytes'] / base['beyond_bytes']:.2f}",
                f"{result['flops'] / one['own_seconds'] / 1e9:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    names = [line.split(":", 1)[1].strip() for line in flags.splitlines() if line.startswith("model name")]
    return {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "has": [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "threads": threads,
        "torch": torch.__version__,
        "cpp_compiler": shutil.which("g++") is not None,
        "commit": commit.stdout.strip(),
        "flops": "sum over products of 2 M K N (1 + wanted gradients); train_step_case.useful lists them",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    drafters = ["dspark", "dflash", "eagle3"]
    parser.add_argument("--drafters", nargs="+", choices=drafters, default=drafters)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--anchors", nargs="+", type=int, default=[64])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, default=1)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=attrs.fields_dict(Case)[name].default)
    parser.add_argument("--output", type=Path, default=Path("train_step.json"))
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    results = []
    for algorithm in options.drafters:
        for tokens in options.tokens:
            for anchors in options.anchors:
                case = Case(
                    algorithm=algorithm,
                    tokens=tokens,
                    anchors=anchors,
                    device=options.device,
                    dtype=options.dtype,
                    **sizes,
                )
                results.append(compare(case, options.ways, options.threads, options.turns, options.micro_batches))
                report = {**machine(options.threads), "results": results}
                options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                print(table(results[-1:]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
