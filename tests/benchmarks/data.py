"""Preparing data and reading caches: memory by the number of conversations, and speed against plain means.

    python tests/benchmarks/data.py tokens --conversations 10000 300000 --output runs/data
    python tests/benchmarks/data.py rendering --output runs/data
    python tests/benchmarks/data.py cache --output runs/data

`tokens`: for each number a process of its own stores the tokens of so many short conversations and then reads all of
them in a shuffled order, as training does. Peaks are beyond the process that has loaded its tokenizer: `held` is
memory of the process's own (RssAnon); `mapped` are pages of the stored files (RssFile), which the system takes back
when it needs them. `rendering`: conversations a second of one core, and of two processes, from messages to ids and
masks, against the tokenizer called with the same texts; in turns, medians. `cache`: reading and writing features
(cache_speed.py). All print JSON, and write it as it is measured; `tokens`, run again, goes on with the sizes that are
missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

WORDS = "the a of and water river stone light house tree seven old new green walk think because under with they"
RUN_FILE = """
[run]
name = "benchmark"
output = "out"
stages = ["train"]
[target]
model = "builtin:tiny-qwen3"
layers = [1]
[data]
sources = [{ path = "rows.jsonl" }]
held_out = 0.01
min_supervised_tokens = 1
[features]
mode = "online"
[draft]
type = "dflash"
"""
# Turns of a conversation, and words of an answer. Prompts are a quarter as long.
SHAPES = ((1, 40), (1, 250), (4, 150))


def rows(number: int, turns: int, words: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    for index in range(number):
        messages = [
            {
                "role": role,
                "content": " ".join(rng.choices(WORDS.split(), k=words if role == "assistant" else words // 4)),
            }
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
        yield {"id": f"row {index}", "messages": messages}


def memory() -> tuple[int, int]:
    """Bytes of the process's own, and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10, int(lines["RssFile"].split()[0]) << 10


class Peak:
    """The largest of both while the block runs, looked at every 20 ms."""

    def __enter__(self) -> Peak:
        self.before, self.over, self._end = memory(), [0, 0], threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._end.wait(0.02):
            self.over = [
                max(peak, now - then) for peak, now, then in zip(self.over, memory(), self.before, strict=True)
            ]

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def one_size(number: int, workers: int) -> dict[str, Any]:
    import numpy as np

    from deepspec_core.config.load import load_run_file
    from deepspec_core.features.online import OnlineFeatures
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "train.toml"
        path.write_text(RUN_FILE)
        with (Path(place) / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(number, 1, 20))
        plugins = load_plugins()
        given = [f"data.workers={workers}"]
        run = Run(file=load_run_file(path, overrides=given, plugins=plugins), path=path, plugins=plugins)
        tokenizer, _ = run.target.tokenizer, run.target.model
        tokenizer.encode("once")
        with Peak() as storing:
            start = time.perf_counter()
            samples = run.data.training_samples()
            seconds = time.perf_counter() - start
        with Peak() as reading:
            source = OnlineFeatures(samples, run.target.model, (0,))
            tokens = 0
            start = time.perf_counter()
            for index in np.random.default_rng(0).permutation(len(source)):
                tokens += len(source[index].input_ids)
            read_seconds = time.perf_counter() - start
        stored = sum(file.stat().st_size for file in run.data.tokens_folder.iterdir())
        return {
            "conversations": number,
            "tokens": tokens,
            "stored_bytes": stored,
            "storing": {"held": storing.over[0], "mapped": storing.over[1], "seconds": seconds},
            "reading": {"held": reading.over[0], "mapped": reading.over[1], "seconds": read_seconds},
        }


def tokens(options: argparse.Namespace, write: Callable[[dict[str, Any]], None], known: dict[str, Any]) -> None:
    sizes = {size["conversations"]: size for size in known.get("sizes", ())}
    for number in sorted(options.conversations):
        if number not in sizes:
            command = [sys.executable, __file__, "one-size", str(number), "--workers", str(options.workers)]
            sizes[number] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        found = [sizes[each] for each in sorted(sizes)]
        first, last = found[0], found[-1]
        more = max(1, last["conversations"] - first["conversations"])
        bytes_more = {
            part: {kind: (last[part][kind] - first[part][kind]) / more for kind in ("held", "mapped")}
            for part in ("storing", "reading")
        }
        write({"sizes": found, "bytes_a_conversation": bytes_more})


def rendering(options: argparse.Namespace, write: Callable[[dict[str, Any]], None], known: dict[str, Any]) -> None:
    import deepspec_core as ds
    from deepspec_core.data.conversations import from_row
    from deepspec_core.data.token_workers import in_processes
    from deepspec_core.data.tokenize import ChatTokenizer
    from deepspec_core.data.tokenizing import CHUNK, Tokenisation

    target = ds.load_target("builtin:tiny-qwen3")
    chat = ChatTokenizer(target.tokenizer)
    ours = Tokenisation(tokenizer=chat, fmt=target.adapter.conversation_format(), max_length=1 << 20)
    backend = target.tokenizer.backend_tokenizer

    def call(texts: list[str]) -> None:
        for text in texts:
            target.tokenizer(text, add_special_tokens=False, verbose=False)

    def core(texts: list[str]) -> None:
        for text in texts:
            _ = backend.encode(text, add_special_tokens=False).ids

    def all_of_it(conversations: list[Any]) -> None:
        for begin in range(0, len(conversations), CHUNK):
            ours(conversations[begin : begin + CHUNK])

    def rate(work: Callable[[Any], object], items: list[Any]) -> float:
        start = time.process_time()
        work(items)
        return len(items) / (time.process_time() - start)

    found = dict(known)
    all_of_it([from_row(row, "benchmark") for row in rows(CHUNK, 1, 20)])  # nothing is made for the first time below
    for turns, words in SHAPES:
        # As many tokens of each.
        number = max(CHUNK, options.conversations[0] * 50 // (turns * words))
        conversations = [from_row(row, "benchmark") for row in rows(number, turns, words)]
        texts = [chat.render(one.messages, None, prompt=False) for one in conversations]
        figures: dict[str, list[float]] = {"tokenizer": [], "its core": [], "ours": []}
        for _ in range(options.turns):
            figures["tokenizer"].append(rate(call, texts))
            figures["its core"].append(rate(core, texts))
            figures["ours"].append(rate(all_of_it, conversations))
        name = f"{turns} turns, answers of {words} words"
        found[name] = {
            "tokens": median(len(chat.encode(text)[0]) for text in texts),
            **{f"{name}, conversations/s": median(values) for name, values in figures.items()},
            "ours / tokenizer": median(a / b for a, b in zip(figures["ours"], figures["tokenizer"], strict=True)),
            "ours / its core": median(a / b for a, b in zip(figures["ours"], figures["its core"], strict=True)),
        }
        write(found)
        for processes in options.processes:
            number = options.chunks * processes * CHUNK
            stream = in_processes(islice(cycle(conversations), CHUNK + number), ours, processes)
            # The processes are there once the first chunk has come. All of it was made before the clock starts.
            assert sum(1 for _ in islice(stream, CHUNK)) == CHUNK
            start = time.perf_counter()
            count = sum(1 for _ in islice(stream, number))
            # Until the last one: ending the processes is no more part of it than starting them.
            found[name][f"{processes} processes, conversations/s"] = count / (time.perf_counter() - start)
            assert next(stream, None) is None, "that was the last one"
            write(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, defaults in (("tokens", [10_000, 300_000]), ("rendering", [400])):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--conversations", type=int, nargs="+", default=defaults)
        command.add_argument("--workers", type=int, default=1)
        command.add_argument("--turns", type=int, default=7)
        command.add_argument("--processes", type=int, nargs="*", default=[1, 2])
        # Of each process: of the others, those that are on their way when the clock starts are counted too.
        command.add_argument("--chunks", type=int, default=32)
    cache = commands.add_parser("cache")
    cache.add_argument("--output", type=Path, required=True)
    cache.add_argument("--samples", type=int, default=512)
    cache.add_argument("--hidden-size", type=int, default=1024)
    cache.add_argument("--turns", type=int, default=5)
    single = commands.add_parser("one-size")
    single.add_argument("number", type=int)
    single.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    # Each core is measured alone.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if options.command == "one-size":
        print(json.dumps(one_size(options.number, options.workers)))
        return
    import tokenizers
    import transformers
    from cache_speed import measure

    machine = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "conversations")}
    settings = json.loads(json.dumps(settings))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.command}.json"
    known: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text())
        # What another version or machine measured is measured again.
        if {"settings": settings, **machine} == {key: before[key] for key in ("settings", *machine)}:
            known = before["figures"] if options.command == "tokens" else {}

    def write(figures: dict[str, Any]) -> None:
        load = [round(each, 1) for each in os.getloadavg()]
        result = {"settings": settings, **machine, "load": load, "figures": figures}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1))
        os.replace(partial, path)

    if options.command == "cache":
        write(measure(options))
    else:
        (tokens if options.command == "tokens" else rendering)(options, write, known)
    print(path.read_text())


if __name__ == "__main__":
    main()
