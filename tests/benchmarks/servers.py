"""Regeneration through one server: its share of the tokens a second that the server makes when it is only asked.

    vllm serve DIR --max-model-len 1024 ... &
    python tests/benchmarks/servers.py --address http://127.0.0.1:8000/v1 --output runs/servers [--turns 3]

DIR is the built-in target's folder, which --where prints. The same prompts are sent to the server at a fixed number of
requests at once, and answered by regenerate() with a farm of that server that may have as many. Turns alternate. Two
rates are taken of each: that of the whole, and that from a quarter of the answers to nine tenths of them, when the farm
has found its number of requests at once and none of them lacks a successor. Writes servers.json and prints the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import httpx2

import deepspec_core as ds
from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.answering import Answer
from deepspec_core.data.conversations import from_row
from deepspec_core.data.regenerate import regenerate
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.wanted import Wanted

BUILTIN, MAX_LENGTH = "builtin:tiny-qwen3", 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--where", action="store_true", help="print the folder to serve, and end")
    parser.add_argument("--address")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--target", help="a model's folder, in place of the built-in target")
    parser.add_argument("--max-tokens", type=int, default=224)
    options = parser.parse_args()
    target = ds.load_target(options.target or BUILTIN)
    folder = options.target or str(Path(target.plugins.registry.load("builtin", "tiny-qwen3")()))
    if options.where:
        print(folder)
        return
    rows = islice(target.plugins.registry.load("builtin", "tiny-dialogues")("train", seed=1), options.conversations)
    # One turn each, so that both ask the same.
    conversations = [
        from_row({"id": str(index), "turns": [row["messages"][0]["content"]]}, "benchmark")
        for index, row in enumerate(rows)
    ]
    tokenizer = ChatTokenizer(target.tokenizer)
    prompts = [tokenizer.render_prompt(one.messages[:1]) for one in conversations]
    stop_ids = tuple(target.architecture.stop_token_ids)
    wanted = Wanted(
        names=(folder,),
        tokenizer=tokenizer,
        vocab_size=target.architecture.vocab_size,
        sampling=Sampling(),
        stop_ids=stop_ids,
        end_id=stop_ids[0],
        max_tokens=options.max_tokens,
        max_length=MAX_LENGTH,
        max_concurrency=options.at_once,
    )

    def regenerated() -> Arrivals:
        came, farm = Arrivals(), Farm(addresses=[options.address], work=Answering(wanted))

        def answerer(hand_out: Callable[[], Iterator[Any]]) -> Iterator[Any]:
            for answer in farm(hand_out):
                assert isinstance(answer, Answer), answer
                came.take(len(answer.completion.output_ids))
                yield answer

        with tempfile.TemporaryDirectory() as place:
            regenerate(
                conversations,
                answerer=answerer,
                tokenizer=tokenizer,
                fmt=target.adapter.conversation_format(),
                options=RegenerateOptions(max_tokens=options.max_tokens),
                sampling=Sampling(),
                stop_ids=stop_ids,
                out=Path(place) / "out.jsonl",
                seed=0,
                max_length=MAX_LENGTH,
            )
        came.end()
        return came

    def asked() -> Arrivals:
        return asyncio.run(ask(options, folder, prompts, stop_ids))

    asked()  # the first requests compile
    turns = [(asked(), regenerated()) for _ in range(options.turns)]
    figures: dict[str, Any] = {}
    for name, rate in (("whole", Arrivals.whole), ("settled", Arrivals.settled)):
        rates = {way: [rate(turn[place]) for turn in turns] for place, way in enumerate(("asked", "regenerated"))}
        share = median(ours / theirs for theirs, ours in zip(*rates.values(), strict=True))
        figures[name] = {**rates, "share": share}
        medians = ", ".join(f"{way} {median(values):.0f} tok/s" for way, values in rates.items())
        print(f"{name}: {medians}, share {share:.3f}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "servers.json").write_text(json.dumps(figures, indent=1))


class Arrivals:
    """When answers came, in seconds from the start, and how many tokens had come by then."""

    def __init__(self) -> None:
        self.start, self.seconds, self.tokens = time.perf_counter(), [0.0], [0]

    def take(self, tokens: int) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.tokens.append(self.tokens[-1] + tokens)

    def end(self) -> None:
        self.took = time.perf_counter() - self.start

    def whole(self) -> float:
        return self.tokens[-1] / self.took

    def settled(self) -> float:
        first, last = len(self.tokens) // 4, len(self.tokens) * 9 // 10
        return (self.tokens[last] - self.tokens[first]) / (self.seconds[last] - self.seconds[first])


async def ask(
    options: argparse.Namespace, model: str, prompts: list[tuple[int, ...]], stop_ids: tuple[int, ...]
) -> Arrivals:
    """The server's answers, as many requests at once as --at-once says."""
    places, came = asyncio.Semaphore(options.at_once), Arrivals()
    async with httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_connections=None)) as client:

        async def one(prompt: tuple[int, ...]) -> None:
            body: dict[str, Any] = {"model": model, "prompt": list(prompt), "temperature": 0.0, "top_k": -1}
            body |= {"max_tokens": min(options.max_tokens, MAX_LENGTH - len(prompt)), "stop_token_ids": list(stop_ids)}
            async with places:
                answer = await client.post(f"{options.address}/completions", json=body | {"return_token_ids": True})
            came.take(len(answer.json()["choices"][0]["token_ids"]))

        await asyncio.gather(*map(one, prompts))
    came.end()
    return came


if __name__ == "__main__":
    main()
