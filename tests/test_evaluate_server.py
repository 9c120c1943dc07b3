"""`deepspec evaluate --server`: figures from a server's own counters are those of its rounds, its answers are compared
with this engine's, and what spoils counters is told."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from counting_server import CountingServer, counting
from jsonschema import Draft202012Validator
from plugin_on_path import install_project

from deepspec_core.cli.evaluate_server import _of_target
from deepspec_core.cli.main import main
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import ConfigError
from deepspec_core.evaluation.metrics_file import schema
from deepspec_core.interface.models import Target
from deepspec_core.pipeline import evaluating_server
from deepspec_core.pipeline.evaluating_server import Asked, evaluate_server
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.untrained.making import make_untrained, proposer_of
from deepspec_core.untrained.named import untrained_of

Start = Callable[..., CountingServer]
TARGET = "builtin:tiny-qwen3"
TOKENS = 18
LOOKUP = Path(__file__).parents[1] / "examples" / "plugins" / "deepspec-lookup"


@pytest.fixture(scope="module", autouse=True)
def lookup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prompt lookup, as if installed."""
    with pytest.MonkeyPatch.context() as patch:
        install_project(LOOKUP, tmp_path_factory.mktemp("installed"), patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and in `own` its greedy evaluation by this engine with prompt lookup."""
    folder = tmp_path_factory.mktemp("served")
    texts = [f"Repeat after me: {n} {n + 1} {n} {n + 1} {n}" for n in range(4)]
    (folder / "task.jsonl").write_text("".join(json.dumps({"turns": [text, "Again."]}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        asked = ["--draft", "lookup", "--target", TARGET, "--task", "task.jsonl", "--temperature", "0"]
        assert main(["evaluate", *asked, "--max-new-tokens", str(TOKENS), "--out", "own"]) == 0
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to change, as the working directory."""
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def start(target: Target) -> Iterator[Start]:
    """start(dialect, speculates): a server of the built-in target; with prompt lookup it speculates."""
    with ExitStack() as stack:

        def make(dialect: str, speculates: bool = True) -> CountingServer:
            proposer = prompt_lookup(target) if speculates else None
            tokenizer = ChatTokenizer(target.tokenizer)
            made = counting(target.model, tokenizer, target.architecture.stop_token_ids, dialect, proposer)
            server = stack.enter_context(made)
            server.model = TARGET
            return server

        yield make


def prompt_lookup(target: Target) -> Proposer:
    registry = load_plugins().registry
    draft = untrained_of("lookup", base=Path(), registry=registry)
    assert draft is not None
    made = make_untrained(
        "lookup",
        draft.options,
        architecture=target.architecture,
        tokenizer=target.tokenizer,
        dtype=torch.float32,
        device=torch.device("cpu"),
        base=Path(),
        registry=registry,
    )
    return proposer_of("lookup", made, registry)


def ask(server: CountingServer, *more: str) -> int:
    asked = ["--target", TARGET, "--task", "task.jsonl", "--max-new-tokens", str(TOKENS), "--out", "served"]
    return main(["evaluate", "--server", server.address.removesuffix("/v1"), *asked, *more])


def report() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("served/metrics.json").read_text())
    assert list(Draft202012Validator(schema()).iter_errors(found)) == []
    return found


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp", "sglang"])
def test_figures_are_those_of_the_rounds_and_outputs_are_compared(
    dialect: str, start: Start, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(start(dialect), "--against", "own", "--batch-size", "2") == 0
    (ours,) = json.loads(Path("own/metrics.json").read_text())["results"]
    found = report()
    (theirs,) = found["results"]
    assert found["server"]["engine"].lower() == dialect
    assert found["draft"]["algorithm"] is found["target"]["revision"] is None
    for name in ("samples", "rounds", "output_tokens", "prompts_digest", "limit_share", "loop_share"):
        assert theirs[name] == ours[name], name
    for name in ("acceptance_length", "draft_tokens_per_proposal", "verify_rate"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-12), name
    assert theirs["acceptance_length_interval"] is theirs["by_context"] is theirs["speculative"]["draft"] is None
    assert theirs["counted"]["disturbed"] is False
    beside = theirs["against"]
    assert (beside["compared"], beside["equal"], beside["differing"]) == (4, 4, [])
    assert beside["acceptance_length"] == pytest.approx(ours["acceptance_length"], rel=1e-12)
    assert theirs["counted"]["kept_per_round"] == beside["kept_per_round"]
    assert beside["by_position"] == pytest.approx(theirs["marginal"], rel=1e-12)
    assert "4 of 4 outputs equal those of this engine" in Path("served/report.md").read_text()
    # Beside others in tables and on a page.
    assert main(["report", "own", "served", "--html", "page.html", "--markdown"]) == 0
    seen = capsys.readouterr()
    assert "target.revision differs" not in seen.out
    assert "a server does not tell target.revision, target.dtype, settings.confidence_threshold" in seen.out
    assert f"{ours['acceptance_length']:.2f}" in seen.out
    assert "Traceback" not in seen.err


def test_a_server_without_speculation_gives_a_plain_result(start: Start, here: Path) -> None:
    for dialect in ("vllm", "llama.cpp"):  # one has no counter of rounds, the other one that stays at 0
        assert ask(start(dialect, False), "--limit", "1", "--force", "evaluate") == 0
        (found,) = report()["results"]
        assert found["counted"]["speculates"] is False
        assert found["acceptance_length"] is found["speculative"] is found["marginal"] is None
        assert found["plain"]["tokens_per_second"] > 0
        assert "no round of speculative decoding" in Path("served/report.md").read_text()


@pytest.mark.parametrize("without_rounds", ["all", "zero", "nothing"])
def test_an_answer_that_ends_at_its_first_token_has_no_rounds(without_rounds: str, start: Start, here: Path) -> None:
    """Older and newer SGLang say of it as little as they can. The rounds of the others count."""
    server = start("sglang")
    server.ends_at_once, server.without_rounds = (2,), without_rounds
    assert ask(server) == 0
    (found,) = report()["results"]
    groups = [json.loads(line) for line in Path("own/evaluate/task-t0.jsonl").read_text().splitlines()[1:]]
    own = [done for group in groups for done in group["completions"]]
    assert found["counted"]["speculates"] is True
    assert found["samples"] == len(own) == 4
    assert found["rounds"] == sum(len(done["rounds"]) for index, done in enumerate(own) if index != 1)
    assert found["acceptance_length"] > 1
    assert found["draft_tokens_per_proposal"] > 0
    assert found["marginal"]
    assert "plain" not in found


def test_answers_that_differ_are_listed(start: Start, here: Path) -> None:
    """The recorded answers are edited: the server's are then others at that place."""
    journal = here / "own" / "evaluate" / "task-t0.jsonl"
    lines = journal.read_text().splitlines()
    group = json.loads(lines[1])
    del group["digest"]
    output = group["completions"][0]["output_ids"]
    was, output[3] = output[3], output[3] + 1
    journal.write_text("\n".join([lines[0], json.dumps(group), *lines[2:]]) + "\n")
    assert ask(start("vllm"), "--against", "own") == 0
    beside = report()["results"][0]["against"]
    name = group["completions"][0]["id"]
    assert beside["differing"] == [{"id": name, "position": 3, "ours": was + 1, "theirs": was}]
    assert f"| {name} | 3 | {was + 1} | {was} |" in Path("served/report.md").read_text()


def test_other_work_of_the_server_is_told(
    start: Start, here: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start("vllm")
    server.others = 5
    assert ask(server, "--against", "own") == 0
    (found,) = report()["results"]
    assert found["counted"]["disturbed"] is True
    assert found["counted"]["tokens_by_counters"] == found["counted"]["tokens_in_answers"] + 4 * 5
    assert found["acceptance_length"] is found["rounds"] is found["marginal"] is None
    assert found["against"]["equal"] == 4
    assert "other clients used it too" in capsys.readouterr().err
    assert "somebody else asked it too" in Path("served/report.md").read_text()
    # SGLang tells the rounds of each answer, which nobody else changes.
    server = start("sglang")
    server.others = 5
    assert ask(server, "--force", "evaluate") == 0
    (found,) = report()["results"]
    assert found["counted"]["disturbed"] is True
    assert found["acceptance_length"] > 1


def refused(
    capsys: pytest.CaptureFixture[str], server: CountingServer, *parts: str, more: tuple[str, ...] = ()
) -> None:
    assert ask(server, *more) == 2
    seen = capsys.readouterr().err
    for part in parts:
        assert part in seen, seen
    assert "Traceback" not in seen
    assert not Path("served/metrics.json").exists()


def test_servers_that_cannot_be_measured_are_refused(
    start: Start, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start("vllm")
    server.model = "somebody/else"
    refused(capsys, server, "A server serves another model", "somebody/else", "--served-as")
    assert not server.asked
    server.always = "html"
    refused(capsys, server, "Speculative decoding cannot be measured on this kind of server", "Welcome to the gateway")
    server = start("llama.cpp")
    for metrics, said in (("missing", "does not support"), ("html", "Welcome"), ("foreign", "other_total")):
        server.metrics = metrics
        refused(capsys, server, "does not show its counters", said, "Start it with --metrics")
    assert not server.asked
    server.metrics, server.restarts = "shown", True
    refused(capsys, server, "counters restarted", "nothing was written")
    server.restarts, server.invented = False, {"num_accepted_tokens": 4000}
    refused(capsys, server, "counters contradict each other", "accepted tokens of", server.address)
    server.invented, server.faults = {}, ["out of memory"]
    refused(capsys, server, "did not answer a prompt", "out of memory", "task.jsonl")
    server.stop()
    refused(capsys, server, "does not answer", server.address)


def test_what_is_known_before_is_said_before(start: Start, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = start("vllm")
    refused(capsys, server, "There is no evaluation in this folder", more=("--against", "nowhere"))
    refused(capsys, server, "There is no answer to compare with", more=("--against", "own", "--temperature", "1"))
    assert ask(server, "--draft", "lookup") == 2
    assert "--draft has no effect on a server" in capsys.readouterr().err
    assert main(["evaluate", "--server", server.address]) == 2
    assert "--server needs RUN, or --target and --task" in capsys.readouterr().err
    assert main(["evaluate", "--server", "here", "--target", TARGET, "--task", "task.jsonl"]) == 2
    assert "http://host:8000" in capsys.readouterr().err
    assert ask(server, "--out", "own") == 2
    assert "would replace those of this engine" in capsys.readouterr().err
    assert not server.asked
    assert ask(server) == 0
    assert ask(server) == 2
    assert "There are results in this folder already" in capsys.readouterr().err


def test_results_of_another_process_meanwhile_stay(
    start: Start, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start("vllm")
    assert ask(server, "--limit", "1") == 0
    finished = Path("served/metrics.json").rename("finished.json").read_bytes()
    taken = evaluating_server.lock

    def late(folder: Path, **options: Any) -> Any:
        shutil.copy("finished.json", folder / "metrics.json")
        return taken(folder, **options)

    monkeypatch.setattr(evaluating_server, "lock", late)
    server.asked.clear()
    assert ask(server) == 2
    assert "There are results in this folder already" in capsys.readouterr().err
    assert Path("served/metrics.json").read_bytes() == finished
    assert not server.asked


def test_a_run_says_what_is_asked(finished_copy: Path, start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Its held-out prompts, by its run file or its folder; results go beside its own."""
    server = start("sglang")
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    small = ["--server", server.address, "--limit", "2", "--max-new-tokens", "18", "--turns", "all"]
    assert main(["evaluate", str(folder), *small]) == 0
    found = json.loads((folder / "served" / "metrics.json").read_text())
    (result,) = found["results"]
    assert (result["task"], result["temperature"], result["samples"]) == ("held-out", 0.0, 2)
    assert result["counted"]["disturbed"] is False
    assert "turns_not_asked" in result
    assert main(["evaluate", str(folder), *small, "--target", TARGET]) == 2
    assert "--target is set by RUN" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sampling_is_sent_or_refused(start: Start, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command says; and what a run says."""
    server = start("vllm")
    refused(capsys, server, "evaluate.stop", "--stop out of the command", more=("--stop", "."))
    sampling = ("--repetition-penalty", "1.2", "--top-p", "0.8", "--min-p", "0.01", "--samples", "3")
    assert ask(server, "--temperature", "0.7", "--limit", "1", *sampling) == 0
    assert {(one["repetition_penalty"], one["top_p"], one["min_p"]) for one in server.asked} == {(1.2, 0.8, 0.01)}
    assert report()["results"][0]["samples"] == 3
    assert report()["settings"]["top_p"] == 0.8
    server.asked.clear()
    said = {"target": TARGET, "tasks": ["task.jsonl"], "max_new_tokens": 18, "temperatures": (0.0, 0.7)}
    run = _of_target(said, load_plugins())

    def asked(**options: Any) -> dict[str, Any]:
        evaluated = evolve(run.file.evaluate, **options)
        changed = Run(file=evolve(run.file, evaluate=evaluated), path=run.path, plugins=run.plugins)
        return evaluate_server(changed, Asked(address=server.address, out=Path("run")))

    with pytest.raises(ConfigError, match=r"(?s)evaluate\.stop"):
        asked(stop=(".",))
    assert not server.asked, "nothing was asked"
    found = asked(repetition_penalty=1.3, top_p=0.9, samples=2)
    assert {(one["repetition_penalty"], one["top_p"]) for one in server.asked} == {(1.3, 0.9)}
    greedy, sampled = (one["samples"] for one in found["results"])
    assert sampled == 2 * greedy, "greedy answers to one prompt are all the same"
    assert found["settings"]["repetition_penalty"] == 1.3
