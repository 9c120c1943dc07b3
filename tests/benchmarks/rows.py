"""The row engine against the straightforward loss, by time and by peak memory: DSpark's mix and Eagle3's soft_ce.

    python tests/benchmarks/rows.py                        the CPU sizes: 448 rows, H = 896, V = 151,936, bf16
    python tests/benchmarks/rows.py --device cuda          3,584 rows, H = 2,560; Eagle3 at 7 x 4,096 rows

What is compared, each in a process of its own so that peaks do not mix:
    straightforward   every logits tensor at once, the loss written down operation by operation, autograd
    compiled          the same function through torch.compile
    engine            deepspec_core.rows.engine, its kernels chosen automatically
    products          the matrix products alone: draft and target forward, and backward
Times are interleaved: every process does one step in turn, several turns after a warm-up. Peak memory on CPU is the
growth of the process's resident set over a step; on CUDA that of allocated memory. All three totals and the gradients
of hidden states are held against float64 on the first rows. Writes JSON and prints the rows of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MIX = {"ce": 0.1, "tv": 0.9, "confidence": 1.0}
GAMMA = 4.0
WAYS = ("straightforward", "compiled", "engine", "products")
Sizes = tuple[int, int, int, int, int]
# name -> rows, hidden size, rank of the correction (0: none), rows of a block, distinct target positions.
SIZES: dict[str, dict[str, Sizes]] = {
    "cpu": {"dspark": (448, 896, 256, 7, 112), "eagle3": (448, 896, 0, 7, 70)},
    "cuda": {"dspark": (3584, 2560, 256, 7, 800), "eagle3": (28672, 2560, 0, 7, 4102)},
    # To see that it runs.
    "tiny": {"dspark": (28, 32, 8, 7, 14), "eagle3": (28, 32, 0, 7, 14)},
}
VOCAB = 151_936


def make(sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random rows, sized so that draft and target agree about as much as half-trained drafts do."""
    rows, hidden, rank, block, positions = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

    # Blocks of overlapping positions, in their order, as anchored blocks and unrolled steps have them.
    starts = torch.linspace(0, positions - block, rows // block, device=device).long()
    index = (starts[:, None] + torch.arange(block, device=device)).flatten()
    target_hidden = normal(positions, hidden)
    data = {
        "hidden": (target_hidden[index] + normal(rows, hidden, scale=0.5)).to(dtype),
        "target_hidden": target_hidden,
        "target_index": index,
        "head": normal(VOCAB, hidden, scale=2.0 / hidden**0.5),
        "labels": torch.randint(0, VOCAB, (rows,), generator=generator, device=device),
        "slot": torch.arange(rows, device=device) % block,
        "block": torch.arange(rows, device=device) // block,
        "confidence": normal(rows).float(),
    }
    if rank:
        data |= {"correction": normal(rows, rank), "correction_head": normal(VOCAB, rank, scale=0.5 / rank**0.5)}
    return data


def leaves(data: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [name for name in ("hidden", "confidence", "correction", "correction_head") if name in data]
    return {**data, **{name: data[name].detach().requires_grad_() for name in names}}


def straightforward(data: dict[str, Tensor], case: str) -> Tensor:
    """The loss as one would write it down: draft and target logits of all rows, and a function a term."""
    draft = data["hidden"] @ data["head"].T
    if "correction" in data:
        draft = draft + data["correction"] @ data["correction_head"].T
    target = data["target_hidden"][data["target_index"]] @ data["head"].T
    if case == "eagle3":
        return soft_cross_entropy(draft, target).sum()
    tv = total_variation(draft, target)
    acceptance = (1 - tv.detach() / 2).clamp(0, 1)
    confidence = F.binary_cross_entropy_with_logits(data["confidence"], acceptance, reduction="none")
    ce = F.cross_entropy(draft.float(), data["labels"], reduction="none")
    value = MIX["ce"] * ce + MIX["tv"] * tv + MIX["confidence"] * confidence
    return (torch.exp(-data["slot"] / GAMMA) * value).sum()


def soft_cross_entropy(draft: Tensor, target: Tensor) -> Tensor:
    return -(target.float().softmax(-1) * draft.float().log_softmax(-1)).sum(-1)


def total_variation(draft: Tensor, target: Tensor) -> Tensor:
    return (draft.float().softmax(-1) - target.float().softmax(-1)).abs().sum(-1)


def products(data: dict[str, Tensor], case: str) -> Tensor:
    """Each vocabulary product once forward and once backward, and nothing else."""
    with torch.no_grad():
        logits = data["hidden"] @ data["head"].T
        data["target_hidden"] @ data["head"].T
        logits @ data["head"]
        if "correction" in data:
            logits = data["correction"] @ data["correction_head"].T
            logits @ data["correction_head"]
            logits.T @ data["correction"]
    return logits.new_zeros(())


def engine(case: str, kernels: str) -> Callable[[dict[str, Tensor], str], Tensor]:
    from deepspec_core.contracts.rows import Heads, Rows
    from deepspec_core.rows.engine import RowEngine
    from deepspec_core.rows.terms import Confidence, CrossEntropy, SoftCrossEntropy, TotalVariation
    from deepspec_core.rows.weighting_options import DecayOptions
    from deepspec_core.rows.weightings import Decay, Uniform

    kinds = {"ce": CrossEntropy, "tv": TotalVariation, "confidence": Confidence}
    if case == "eagle3":
        over = RowEngine({"soft_ce": (SoftCrossEntropy(), 1.0)}, Uniform(), kernels=kernels)
    else:
        terms = {name: (kinds[name](), coefficient) for name, coefficient in MIX.items()}
        over = RowEngine(terms, Decay(DecayOptions(gamma=GAMMA)), kernels=kernels)

    def total(data: dict[str, Tensor], case: str) -> Tensor:
        rows = Rows(
            hidden=data["hidden"],
            correction=data.get("correction"),
            target_hidden=data["target_hidden"],
            target_index=data["target_index"],
            target_ids=data["labels"],
            weight=torch.ones_like(data["slot"], dtype=torch.float32),
            slot=data["slot"],
            block=data["block"],
            extras={"confidence_logits": data["confidence"]} if case == "dspark" else {},
        )
        heads = Heads(draft=data["head"], target=data["head"], correction=data.get("correction_head"))
        return over(rows, heads).total

    return total


def work(pipe: Connection, way: str, case: str, sizes: Sizes, device: str, kernels: str, threads: int) -> None:
    """One process: a step for each message, answered by its seconds; the last answers peak and error."""
    torch.set_num_threads(threads)
    dtype = torch.bfloat16
    function = {"straightforward": straightforward, "products": products}.get(way) or (
        torch.compile(straightforward) if way == "compiled" else engine(case, kernels)
    )
    data = make(sizes, device, dtype)

    def step() -> float:
        given = leaves(data)
        synchronise(device)
        start = time.perf_counter()
        total = function(given, case)
        if total.requires_grad:
            total.backward()
        synchronise(device)
        return time.perf_counter() - start

    step()  # compiles, and loads what is loaded once
    before = in_use(device)
    step()
    peak = peak_since(device) - before
    while pipe.recv():
        step()  # a process that has waited for its turn finds its memory cold
        pipe.send(step())
    # Last: what float64 takes would leave the process's memory in pieces.
    error = 0.0 if way == "products" else worst_error(function, case, sizes, device)
    pipe.send({"peak_bytes": peak, "worst_error": error})


def worst_error(function: Callable[..., Tensor], case: str, sizes: Sizes, device: str) -> float:
    """Gradient of the hidden states against float64, relative to the largest entry, on a few blocks."""
    data = make(sizes, device, torch.bfloat16)
    rows = 4 * sizes[3]
    few = {name: tensor[:rows] if len(tensor) == len(data["hidden"]) else tensor for name, tensor in data.items()}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in few.items()}
    found, expected = leaves(few), leaves(exact)
    function(found, case).backward()
    straightforward_in_double(expected, case).backward()
    assert found["hidden"].grad is not None
    assert expected["hidden"].grad is not None
    gap = (found["hidden"].grad.double() - expected["hidden"].grad).abs().max()
    return float(gap / expected["hidden"].grad.abs().max())


def straightforward_in_double(data: dict[str, Tensor], case: str) -> Tensor:
    """The same without its roundings to float32, which in float64 data would be steps down."""
    draft = data["hidden"] @ data["head"].T
    if "correction" in data:
        draft = draft + data["correction"] @ data["correction_head"].T
    target = (data["target_hidden"] @ data["head"].T)[data["target_index"]].softmax(-1)
    if case == "eagle3":
        return -(target * draft.log_softmax(-1)).sum()
    tv = (draft.softmax(-1) - target).abs().sum(-1)
    value = MIX["ce"] * F.cross_entropy(draft, data["labels"], reduction="none") + MIX["tv"] * tv
    return (torch.exp(-data["slot"].double() / GAMMA) * value).sum()


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_use(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # Forget the peak so far: it is that of making the data.
    Path("/proc/self/clear_refs").write_text("5")
    return pages * resource.getpagesize()


def peak_since(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def flops(sizes: Sizes) -> int:
    """2 * V * (rows * H forward, rows * H backward, positions * H, and rows * r three times)."""
    rows, hidden, rank, _, positions = sizes
    return 2 * VOCAB * (2 * rows * hidden + positions * hidden + 3 * rows * rank)


def compare(
    case: str, sizes: Sizes, ways: list[str], device: str, kernels: str, threads: int, turns: int
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for way in ways:
        pipes[way], other = context.Pipe()
        process = context.Process(target=work, args=(other, way, case, sizes, device, kernels, threads), daemon=True)
        process.start()
        processes.append(process)
        ask(pipes[way])  # one at a time: peaks and warm-ups must not disturb each other
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way in ways:
            seconds[way].append(ask(pipes[way]))
    figures = {}
    for way in ways:
        pipes[way].send(False)
        figures[way] = {"seconds": seconds[way], "median_seconds": statistics.median(seconds[way]), **pipes[way].recv()}
    for process in processes:
        process.join()
    return {"flops": flops(sizes), "ways": figures}


def ask(pipe: Connection) -> float:
    pipe.send(True)
    answer: float = pipe.recv()
    return answer


def table(results: dict[str, Any]) -> str:
    columns = "loss", "way", "median s", "of straightforward", "of the products"
    columns += "beyond inputs, MiB", "of straightforward", "TFLOP/s", "error"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case, result in results.items():
        ways = result["ways"]
        for way, one in ways.items():
            seconds, peak = one["median_seconds"], one["peak_bytes"]
            base, floor = ways.get("straightforward", one), ways.get("products", one)
            cells = (
                case,
                way,
                f"{seconds:.2f}",
                f"{seconds / base['median_seconds']:.2f}",
                f"{seconds / floor['median_seconds']:.2f}",
                f"{peak / 2**20:,.0f}",
                f"{peak / base['peak_bytes']:.2f}",
                f"{result['flops'] / seconds / 1e12:.2f}",
                f"{one['worst_error']:.1e}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", choices=SIZES, help="default: those of the device")
    parser.add_argument("--cases", nargs="+", choices=SIZES["cpu"], default=list(SIZES["cpu"]))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("rows.json"))
    options = parser.parse_args()
    sizes = SIZES[options.sizes or options.device]
    given = options.ways, options.device, options.kernels, options.threads, options.turns
    results = {case: compare(case, sizes[case], *given) for case in options.cases}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = {
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "cpp_compiler": shutil.which("g++") is not None,
        "commit": commit.stdout.strip(),
        "kernels": options.kernels,
    }
    options.output.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
