"""Answers and features in one pass by vLLM on the CPU, through `deepspec serve`: the features are our adapter's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_server import FeatureServer

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

TAPS = (2, 4, 6, 8, 10)
COUNT = 30
# Of test_features_by_vllm.py, which says why.
FP32, FP32_NORMED = 3e-4, 3e-5
# Greedy, answers of names have 26 tokens, those of apples about 42, and after two turns there is room for 12.
LONGEST, MOST = 84, 32


@pytest.fixture(scope="module")
def path(new_run_file: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file that names a server which is not started yet; every fourth conversation has two turns."""
    folder = tmp_path_factory.mktemp("answers")
    path, data = new_run_file(folder), folder / "asked.jsonl"
    with data.open("w") as file:
        for number in range(COUNT):
            name = ("Mia", "Ben", "Lea", "Tom", "Ida")[number % 5]
            hello = f"Hi, my name is {name}, and I like music."
            asked = (
                hello if number % 2 == 0 else f"There were {number + 60} apples in the shop. 17 were sold. How many?"
            )
            messages = [{"role": "user", "content": asked}]
            if number % 4 == 0:
                messages += [{"role": "assistant", "content": "?"}, {"role": "user", "content": "Hi, my name is Tim."}]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")
    text = path.read_text()
    for old, new in {
        '{path = "builtin:tiny-dialogues", limit = 2500}': f'{{path = "{data}"}}',
        "\n[data]\n": "\n[data]\nheld_out = 0.0\nmin_supervised_tokens = 1\n",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[FeatureServer]:
    folder = path.parent
    # Every prompt in one step: vLLM's CPU build cannot draw with a seed after a prompt of several ("CPU Generator does
    # not use offset", 0.32).
    step = ["--", "--max-num-batched-tokens", "1024", "--max-num-seqs", "8"]
    server = FeatureServer(path, folder / "exchange", folder / "log")
    server._command += [*_words(server), *step]
    server.begin()
    server.wait()
    yield server
    assert server.stop() == 130


def _words(server: FeatureServer, *settings: str) -> list[str]:
    addresses = json.dumps([f"{server.address}/v1"])
    every = [
        'run.stages=["regenerate", "cache", "train"]',
        "run.threads=1",
        f"data.max_length={LONGEST}",
        "features.mode=cached",
        f"features.servers={addresses}",
        f"regenerate.servers={addresses}",
        f"features.exchange='{server.exchange}'",
        "regenerate.features=true",
        f"regenerate.max_tokens={MOST}",
        "cache.dtype=float32",
        *settings,
    ]
    return [word for setting in every for word in ("--set", setting)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_features_that_came_with_answers_are_our_adapters(
    path: Path, server: FeatureServer, target: Target, temperature: float
) -> None:
    """At every position, the last one too, whatever ended the answer; and answers are those of a plain server."""
    settings = [f"regenerate.temperature={temperature}", f"run.output=at-{temperature}"]
    assert main(["run", str(path), "--stages", "regenerate,cache", *_words(server, *settings)]) == 0
    run = path.parent / f"at-{temperature}"
    said: dict[str, dict[str, Any]] = {
        stage: json.loads((run / stage / "stage.json").read_text())["summary"] for stage in ("regenerate", "cache")
    }
    print(json.dumps(said))  # noqa: T201
    lines = [json.loads(line) for line in (run / "regenerate" / "conversations.jsonl").read_text().splitlines()]
    # An answer that meets the limit ends its conversation: where a question was to follow, no features were asked for.
    # Two conversations may have the same text. Then the features of one are those of the other.
    texts = [(tuple(line["prompt_ids"] + line["output_ids"]), line["dropped_turns"] > 0) for line in lines]
    received = {text for text, cut_short in texts if not cut_short}
    early = sum(text not in received for text, _ in texts)
    assert len(lines) == COUNT
    assert said["cache"]["with answers"] == COUNT - early
    assert sum(said["cache"]["asked again"].values()) == early
    ends = {(line["finish_reason"], len(line["prompt_ids"]) + len(line["output_ids"]) == LONGEST) for line in lines}
    expected = {("stop", False), ("length", True), ("length", False)}
    assert ends == expected if temperature == 0 else ends <= expected | {("stop", True)}
    reader = HDF5Format().open(run / "cache", None)
    apart = apart_normed = 0.0
    for number in range(len(reader)):
        sample = reader[number]
        ids = sample.input_ids[None]
        with torch.no_grad():
            ours = target.model.features(ids, torch.ones_like(ids, dtype=torch.bool), None, None, TAPS)
        assert sample.features is not None
        apart = max(apart, float((sample.features.hidden - ours.hidden[0]).abs().max()))
        apart_normed = max(apart_normed, float((sample.features.last_hidden - ours.last_hidden[0]).abs().max()))
    print(f"{apart:.1e} apart; final {apart_normed:.1e}")  # noqa: T201
    assert apart < FP32
    assert apart_normed < FP32_NORMED
    assert list(server.exchange.iterdir()) == []
    if temperature == 0:
        here = [*_words(server, *settings), *("--set", "regenerate.features=false")]
        here += ["--set", "regenerate.servers=[]", "--set", "features.servers=[]", "--set", "run.output=here"]
        assert main(["run", str(path), "--stages", "regenerate", *here]) == 0
        plain = (path.parent / "here" / "regenerate" / "conversations.jsonl").read_text().splitlines()
        same = sum(json.loads(one)["output_ids"] == two["output_ids"] for one, two in zip(plain, lines, strict=True))
        print(f"{same} of {COUNT} greedy answers are those of this process")  # noqa: T201
        assert same >= 0.9 * COUNT
