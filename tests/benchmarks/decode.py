"""The engine's speed beside transformers' `generate`, its own prompt lookup, and a speculative loop of one sequence.

    python tests/benchmarks/decode.py --output runs/decode                       the built-in target
    python tests/benchmarks/decode.py --output runs/decode --real DIR            DIR: a model's folder
    python tests/benchmarks/decode.py --output runs/decode --real DIR --device cuda --tokens 256 --batch 1 8 32 128
    python tests/benchmarks/decode.py --output runs/decode --parts speculative --draft RUN/draft

What is compared, in pairs that take turns:
    plain          the engine without a draft, and `generate` of the same prompts (left-padded where there are several)
    lookup         the engine with prompt lookup, and `generate(prompt_lookup_num_tokens=...)`, one sequence
    loop           the engine with prompt lookup, and the loop below with the same proposals, one sequence
    batch          the engine with more sequences, and with one, in tokens a second
    speculative    the engine with --draft (without it: prompt lookup), without a draft, and `generate`, at every batch
    temperature    a draft's time a round at temperature 1, and at 0; drafts of every algorithm with random weights
Every way makes the same number of tokens: stop tokens do not end it. Figures are medians over the pairs; a ratio is
that of the two of a pair. Greedy outputs are compared, and those that differ are counted. `of_floor` is the engine's
time a token over the least there can be: the weights' bytes at the speed of a copy, or 2 operations for each weight and
sequence at the speed of a large product, whichever takes longer; both speeds are measured in the run.
On a CPU that other work shares, `--time cpu` counts the process's own time in place of the wall clock's. It is the sum
over threads, and ratios are then of the work done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from attrs import fields
from deepspec_lookup.draft import LookupProposer, Text
from deepspec_lookup.options import LookupOptions
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

import deepspec_core as ds
from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.decoding.engine import Clock, Request, decode
from deepspec_core.interface.prompts import PromptReader
from deepspec_core.pipeline import threads
from deepspec_core.pipeline.machine import machine_of

sys.path.insert(0, str(Path(__file__).parent))
from context_length import held_out_questions
from trees import commit

BUILTIN, PROPOSED = "builtin:tiny-qwen3", 7
PARTS = ["plain", "lookup", "loop", "batch", "speculative", "temperature"]
Outputs = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--real", type=Path, help="a model's folder, in place of the built-in target")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="default: float32 of the built-in target, else bfloat16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--time", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--draft", help="of the part speculative: a checkpoint, such as RUN/draft")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    options = parser.parse_args()
    name = str(options.real) if options.real else BUILTIN
    dtype = options.dtype or ("bfloat16" if options.real else "float32")
    target = ds.load_target(name, dtype=dtype, device=options.device)
    draft = ds.load_draft(options.draft, target) if options.draft else None
    count = threads.for_decoding(target.architecture, target.model.device, batch_size=max(options.batch))
    with threads.using(count):
        bench = Bench(target, options.pairs, options.tokens, process_time if options.time == "cpu" else perf_counter)
        figures: dict[str, Any] = {"ceilings": bench.ceilings}
        if "plain" in options.parts:
            figures["plain"] = [bench.plain(size) for size in options.batch]
        if "lookup" in options.parts:
            figures["lookup"] = bench.lookup()
        if "loop" in options.parts:
            figures["loop"] = bench.loop()
        if "batch" in options.parts:
            figures["batch"] = [bench.batch(size) for size in options.batch if size > 1]
        if "speculative" in options.parts:
            figures["speculative"] = [bench.speculative(size, draft) for size in options.batch]
        if "temperature" in options.parts:
            names = target.plugins.registry.trained_drafts()
            figures["temperature"] = [bench.temperature(one, size) for one in names for size in options.batch]
        machine = machine_of(target.model.device)
    settings = {"target": BUILTIN if options.real is None else options.real.name, "dtype": dtype, "pairs": bench.pairs}
    report = {
        "commit": commit(),
        "machine": {**machine, "compiler": _compiler(), "load": os.getloadavg()},
        "settings": {
            **settings,
            "tokens": bench.tokens,
            "proposed": PROPOSED,
            "draft": Path(options.draft).name if options.draft else "prompt lookup",
            "batch": options.batch,
            "time": options.time,
        },
        "figures": figures,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "decode.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


class Bench:
    """A target, its weights once more for transformers, and prompts that no pair has twice."""

    def __init__(self, target: Any, pairs: int, tokens: int, now: Callable[[], float]) -> None:
        self.target, self.pairs, self.tokens, self.now = target, pairs, tokens, now
        self.model, self.device = target.model, target.model.device
        self.hub = AutoModelForCausalLM.from_pretrained(self._folder(), dtype=self.model.dtype).to(self.device).eval()
        reader = PromptReader(target, False, None)
        self.questions = (reader.ids([question], "prompt") for question in held_out_questions())
        self.weights = sum(one.numel() for one in self.hub.parameters())
        self.ceilings = _ceilings(self.device, self.model.dtype, now)

    def _folder(self) -> str:
        where = self.target.architecture.name
        return where if Path(where).is_dir() else str(self.target.plugins.registry.load("builtin", "tiny-qwen3")())

    def prompts(self, count: int) -> list[tuple[int, ...]]:
        return list(islice(self.questions, count))

    # The ways.

    def engine(
        self, prompts: Sequence[tuple[int, ...]], proposer: Proposer | None, temperature: float = 0.0
    ) -> tuple[float, Outputs, Clock, int]:
        """Seconds, outputs, where the time went, and rounds."""
        requests = [Request(id=str(index), prompt_ids=ids, seed=index) for index, ids in enumerate(prompts)]
        clock = Clock(now=self.now)
        start = self._now()
        found = decode(
            self.model, proposer, requests, sampling=Sampling(temperature=temperature), stop_ids=(),
            max_new_tokens=self.tokens, batch_size=len(prompts), max_length=max(map(len, prompts)) + self.tokens,
            clock=clock,
        )  # fmt: skip
        done = {int(one.id): one for one in found}
        seconds = self._now() - start
        ordered = [done[index] for index in range(len(prompts))]
        return seconds, [list(one.output_ids) for one in ordered], clock, max(len(one.rounds) for one in ordered)

    def generate(self, prompts: Sequence[tuple[int, ...]], **more: Any) -> tuple[float, Outputs]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=self.device)
        # None of the model's own settings: greedy, to the end.
        self.hub.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=self.tokens, pad_token_id=0, eos_token_id=None
        )
        start = self._now()
        with torch.no_grad():
            found = self.hub.generate(input_ids=ids, attention_mask=mask, **more)
        seconds = self._now() - start
        return seconds, found[:, longest:].tolist()

    @torch.no_grad()
    def own_loop(self, prompt: tuple[int, ...]) -> tuple[float, Outputs]:
        """Speculation of one sequence in the fewest words: propose by lookup, one pass, keep what agrees."""
        start = self._now()
        text, cache, output = Text(LookupOptions(max_tokens=PROPOSED)), DynamicCache(), list[int]()
        text.extend(prompt)
        given, proposed = list(prompt), list[int]()
        while len(output) <= self.tokens:  # one round more than is needed, as the engine and the published loop do
            ids = torch.tensor([[*given, *proposed]], device=self.device)
            logits = self.hub(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=len(proposed) + 1
            ).logits
            best = logits[0].argmax(-1).tolist()
            right = next((k for k, token in enumerate(proposed) if token != best[k]), len(proposed))
            committed = best[: right + 1]
            output += committed
            text.extend(committed)
            if right < len(proposed):
                cache.crop(right - len(proposed))
            given, proposed = committed[-1:], text.continued(PROPOSED)
        return self._now() - start, [output[: self.tokens]]

    # The comparisons.

    def plain(self, batch: int) -> dict[str, Any]:
        pairs, different = [], 0
        for prompts in self._rounds(batch):
            ours, outputs, _, _ = self.engine(prompts, None)
            theirs, other = self.generate(prompts)
            pairs.append((ours, theirs))
            different += sum(one != two for one, two in zip(outputs, other, strict=True))
        token = statistics.median(ours for ours, _ in pairs[1:]) / self.tokens
        return {
            "batch": batch,
            **self._compared(pairs, batch),
            "different": different,
            "of_floor": token / self._floor(batch),
        }

    def lookup(self) -> dict[str, Any]:
        def other(prompt: tuple[int, ...]) -> tuple[float, Outputs]:
            return self.generate([prompt], prompt_lookup_num_tokens=PROPOSED)

        return self._speculative(other)

    def loop(self) -> dict[str, Any]:
        return self._speculative(self.own_loop)

    def _speculative(self, other: Callable[[tuple[int, ...]], tuple[float, Outputs]]) -> dict[str, Any]:
        pairs, different, parts = [], 0, []
        for prompts in self._rounds(1):
            ours, outputs, clock, rounds = self.engine(prompts, LookupProposer(LookupOptions(max_tokens=PROPOSED)))
            theirs, found = other(prompts[0])
            pairs.append((ours, theirs))
            different += outputs[0] != found[0][: self.tokens]
            parts.append(_parts(clock, rounds))
        return {**self._compared(pairs, 1), "different": different, "milliseconds": _medians(parts[1:])}

    def batch(self, size: int) -> dict[str, Any]:
        pairs = []
        for prompts in self._rounds(size):
            together = self.engine(prompts, None)[0] / size
            pairs.append((self.engine(prompts[:1], None)[0], together))
        return {
            "batch": size,
            "times_as_many_tokens_a_second": statistics.median(one / more for one, more in pairs[1:]),
            "tokens_a_second": self.tokens / statistics.median(more for _, more in pairs[1:]),
        }

    def speculative(self, batch: int, draft: Any) -> dict[str, Any]:
        pairs, plain_pairs, different, parts, lengths = [], [], 0, [], []
        for prompts in self._rounds(batch):
            proposer = LookupProposer(LookupOptions(max_tokens=PROPOSED)) if draft is None else draft.proposer()
            ours, outputs, clock, rounds = self.engine(prompts, proposer)
            plain, _, _, _ = self.engine(prompts, None)
            theirs, other = self.generate(prompts)
            pairs.append((ours, theirs))
            plain_pairs.append((ours, plain))
            different += sum(one != two for one, two in zip(outputs, other, strict=True))
            parts.append(_parts(clock, rounds))
            lengths.append(self.tokens / rounds)
        return {
            "batch": batch,
            **self._compared(pairs, batch),
            "times_as_fast_as_plain": self._compared(plain_pairs, batch)["times_as_fast"],
            "tokens_a_round_of_the_slowest": statistics.median(lengths[1:]),
            "different": different,
            "milliseconds": _medians(parts[1:]),
        }

    def temperature(self, algorithm: str, batch: int) -> dict[str, Any]:
        draft = self._draft(algorithm)
        found: dict[float, list[dict[str, float]]] = {0.0: [], 1.0: []}
        for prompts in self._rounds(batch):
            for temperature, parts in found.items():
                _, _, clock, rounds = self.engine(prompts, draft.proposer(), temperature)
                parts.append(_parts(clock, rounds))
        pairs = list(zip(found[1.0][1:], found[0.0][1:], strict=True))
        return {
            "draft": algorithm,
            "batch": batch,
            "milliseconds": {f"T={temperature:g}": _medians(parts[1:]) for temperature, parts in found.items()},
            "draft_ratio": statistics.median(warm["draft"] / cold["draft"] for warm, cold in pairs),
            "verify_ratio": statistics.median(warm["verify"] / cold["verify"] for warm, cold in pairs),
        }

    def _draft(self, algorithm: str) -> Any:
        """A draft with random weights: what it says is nonsense, and takes as long as sense."""
        registry, architecture = self.target.plugins.registry, self.target.architecture
        spec = registry.get("draft", algorithm)
        given = {"block_size": PROPOSED + 1, "ttt_length": PROPOSED, "mask_token_id": architecture.vocab_size - 1}
        known = {one.name for one in fields(spec.options)}
        own = spec.options(**{name: value for name, value in given.items() if name in known})
        layers = architecture.num_layers
        taps = tuple(sorted({1 + (layers - 3) * k // 2 for k in range(3)})) if layers > 3 else (0,)
        torch.manual_seed(1)
        draft = registry.load("draft", algorithm)(own, self.target.adapter, taps)
        draft.adopt(self.model.embedding_weight(), self.model.head_weight())
        return draft.to(device=self.device, dtype=self.model.dtype).eval()

    def _rounds(self, batch: int) -> Any:
        """Fresh prompts for each pair; the first pair warms up and does not count."""
        for _ in range(self.pairs + 1):
            yield self.prompts(batch)

    def _compared(self, pairs: list[tuple[float, float]], batch: int) -> dict[str, float]:
        counted = pairs[1:]
        return {
            "engine_tokens_a_second": batch * self.tokens / statistics.median(ours for ours, _ in counted),
            "other_tokens_a_second": batch * self.tokens / statistics.median(theirs for _, theirs in counted),
            "times_as_fast": statistics.median(theirs / ours for ours, theirs in counted),
        }

    def _floor(self, batch: int) -> float:
        """Seconds a token of all sequences takes at least."""
        bytes_read = self.weights * self.model.dtype.itemsize
        return max(
            bytes_read / self.ceilings["copy_bytes_a_second"],
            2 * self.weights * batch / self.ceilings["product_operations_a_second"],
        )

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()


def _parts(clock: Clock, rounds: int) -> dict[str, float]:
    """Milliseconds a round."""
    return {name: 1000 * getattr(clock, name) / rounds for name in ("draft", "verify", "host")} | {
        "prefill": 1000 * clock.prefill  # of all prompts, once
    }


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in parts) for name in parts[0]}


def _ceilings(device: torch.device, dtype: torch.dtype, now: Callable[[], float]) -> dict[str, float]:
    """What a large product and a copy of random numbers reach here, at best."""
    size, numbers = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.randn(numbers, device=device)
    out = torch.empty_like(c)

    def least(act: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = now()
            act()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(now() - start)
        return min(times[1:])

    return {
        "product_operations_a_second": 2 * size**3 / least(lambda: a @ b),
        "copy_bytes_a_second": 2 * c.numel() * c.element_size() / least(lambda: out.copy_(c)),
    }


def _compiler() -> bool:
    import shutil

    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


if __name__ == "__main__":
    main()
