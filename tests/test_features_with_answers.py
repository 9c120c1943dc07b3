"""Regeneration and features in one pass: the same cache as in two, and what did not come is asked for again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_stand_in import ONE_AT_A_TIME, AnsweringStandIn, feature_servers

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cache.sharded import ShardedWriter
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.features.served.exchange import Ownership, owner_of
from deepspec_core.interface.models import Target
from deepspec_core.pipeline.feature_servers import _prompt
from deepspec_eagle3.preparation import StepPreparation

TAPS = (2, 4, 6, 8, 10)
MODEL = "builtin:tiny-qwen3"
COUNT = 9
WHO = ("Mia", "Ben", "Lea", "Tom", "Ida", "Max", "Zoe", "Sam", "Eva")
# Faults of the features alone, and what is said of each.
FAULTS = {
    "lost": "A server's file is not there",
    "wrong ids": "A server read other token ids than it was sent",
    "truncated": "A server's file is damaged",
    "nan": "A state is not finite",
    "fewer": "A server's token_ids are of another shape or type",
    "layers": "A server gives other layers than this run asks for",
    "no path": "A server gives no hidden states with its answer",
    "refused": "A server could not write the hidden states of a text",
}


def write_run_file(folder: Path, new_run_file: Callable[[Path], Path]) -> Path:
    """The quickstart's, with nine conversations, every third of them of two turns."""
    path, data = new_run_file(folder), folder / "asked.jsonl"
    with data.open("w") as file:
        for number, name in enumerate(WHO):
            messages = [{"role": "user", "content": f"Hi, my name is {name}, and I like music."}]
            if number % 3 == 0:
                messages += [{"role": "assistant", "content": "?"}, {"role": "user", "content": "Hi, my name is Tim."}]
            file.write(json.dumps({"id": f"c{number}", "messages": messages}) + "\n")
    text = path.read_text()
    for old, new in {
        '{path = "builtin:tiny-dialogues", limit = 2500}': f'{{path = "{data}"}}',
        "\n[data]\n": "\n[data]\nheld_out = 0.0\nmin_supervised_tokens = 1\nmax_bad_rows = 0.0\n",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture
def run_file(tmp_path: Path, new_run_file: Callable[[Path], Path]) -> Path:
    return write_run_file(tmp_path, new_run_file)


@pytest.fixture(scope="module")
def in_two_passes(
    new_run_file: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, dict[str, Sample]]:
    """The answers, and the cache, of the same run in this process."""
    path = write_run_file(tmp_path_factory.mktemp("two-passes"), new_run_file)
    assert main(["run", str(path), "--stages", "regenerate,cache", *COMMON]) == 0
    folder = folder_of(path)
    return (folder / "regenerate" / "conversations.jsonl").read_bytes(), cached(folder / "cache")


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    (tmp_path / "exchange").mkdir()
    return tmp_path / "exchange"


@pytest.fixture
def servers(exchange: Path, target: Target) -> Iterator[list[AnsweringStandIn]]:
    """Two servers of the built-in target, in float32, whose final state is not normed."""
    seen: list[torch.Tensor] = []
    model: Any = target.model
    hook = model.decoder.norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))

    def computed(ids: list[int]) -> torch.Tensor:
        input_ids = torch.tensor([ids])
        with ONE_AT_A_TIME:
            seen.clear()
            found = model.features(input_ids, torch.ones_like(input_ids).bool(), None, None, TAPS)
            hidden = found.hidden[0].view(len(ids), len(TAPS), -1)
            return torch.cat([hidden, seen[-1][0][:, None]], 1)

    ids = [*(tap + 1 for tap in TAPS), target.model.architecture.num_layers]
    running = [AnsweringStandIn(computed, ids, exchange, target, model=MODEL) for _ in range(2)]
    for server in running:
        server.normed, server.sample = "false", list(_prompt(ChatTokenizer(target.tokenizer)))
    with feature_servers(*running):
        yield running
    hook.remove()


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


COMMON = words(
    "run.threads=1",
    'run.stages=["regenerate", "cache", "train"]',
    "features.mode=cached",
    "regenerate.temperature=0",
    "regenerate.max_tokens=32",
    "cache.dtype=float32",
    "cache.batch_size=1",
)


def run(
    path: Path, exchange: Path, servers: list[AnsweringStandIn], *settings: str, stages: str = "", workers: int = 1
) -> int:
    addresses = json.dumps([server.address for server in servers])
    own = [f"features.servers={addresses}", f"features.exchange='{exchange}'", f"regenerate.servers={addresses}"]
    own += ["regenerate.features=true", "features.file_timeout=0.2", *settings]
    begun = ["run", str(path), "--workers", str(workers), "--stages", stages or "regenerate,cache"]
    return main([*begun, *COMMON, *words(*own)])


def folder_of(path: Path) -> Path:
    return path.parent / "runs" / "quickstart-dflash"


def cached(folder: Path) -> dict[str, Sample]:
    reader = HDF5Format().open(folder, None)
    return {sample.id: sample for sample in (reader[number] for number in range(len(reader)))}


def summary(path: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder_of(path) / stage / "stage.json").read_text())["summary"])


def check(path: Path, in_two_passes: tuple[bytes, dict[str, Sample]]) -> None:
    """The cache is that of two passes to the bit: samples, order and every position, the last one too."""
    answers, expected = in_two_passes
    assert (folder_of(path) / "regenerate" / "conversations.jsonl").read_bytes() == answers
    found = cached(folder_of(path) / "cache")
    assert list(found) == list(expected)
    assert len(found) == COUNT
    for name, sample in expected.items():
        assert torch.equal(found[name].input_ids, sample.input_ids)
        assert torch.equal(found[name].loss_mask, sample.loss_mask)
        assert found[name].features is not None
        assert sample.features is not None
        torch.testing.assert_close(found[name].features.hidden, sample.features.hidden, rtol=0, atol=0)
        torch.testing.assert_close(found[name].features.last_hidden, sample.features.last_hidden, rtol=0, atol=0)


@pytest.mark.slow
def test_a_cache_in_one_pass_is_that_of_two(
    run_file: Path, exchange: Path, servers: list[AnsweringStandIn], in_two_passes: tuple[bytes, dict[str, Sample]]
) -> None:
    assert run(run_file, exchange, servers) == 0
    assert sum(len(server.answered) for server in servers) == COUNT, "one file for each conversation"
    assert not any(server.asked for server in servers), "nothing is asked for again"
    said = summary(run_file, "regenerate")
    assert (said["texts_with_features"], said["texts_without_features"]) == (COUNT, {})
    said = summary(run_file, "cache")
    assert (said["with answers"], said["asked again"]) == (COUNT, {})
    assert list(exchange.iterdir()) == []
    assert not (folder_of(run_file) / "regenerate" / "features").exists(), "the cache has it all"
    check(run_file, in_two_passes)


def test_what_did_not_come_is_asked_for_with_its_reason(
    run_file: Path,
    exchange: Path,
    servers: list[AnsweringStandIn],
    capsys: pytest.CaptureFixture[str],
    in_two_passes: tuple[bytes, dict[str, Sample]],
) -> None:
    """An answer counts whatever became of its features; half an answer does not."""
    servers[0].answer_faults = ["half", *FAULTS]
    assert run(run_file, exchange, servers[:1]) == 0
    reasons = dict.fromkeys(FAULTS.values(), 1)
    assert summary(run_file, "regenerate")["texts_without_features"] == reasons
    said = summary(run_file, "cache")
    assert (said["with answers"], said["asked again"]) == (COUNT - len(FAULTS), reasons)
    assert len(servers[0].asked) == len(FAULTS)
    said = capsys.readouterr().err
    assert "1 answers were received without features; the cache stage will request them: A state is not finite" in said
    assert list(exchange.iterdir()) == []
    check(run_file, in_two_passes)


@pytest.mark.slow
def test_several_workers_fill_the_cache(
    run_file: Path,
    exchange: Path,
    servers: list[AnsweringStandIn],
    in_two_passes: tuple[bytes, dict[str, Sample]],
) -> None:
    """The first one has the answers; all of them take what was kept, and ask for what was not."""
    servers[0].answer_faults = ["lost", "nan"]
    assert run(run_file, exchange, servers, "cache.shard_samples=2", "run.threads=2", workers=2) == 0
    said = summary(run_file, "cache")
    assert said["with answers"] == COUNT - 2
    assert sum(len(server.asked) for server in servers) == 2
    check(run_file, in_two_passes)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(
    run_file: Path,
    exchange: Path,
    servers: list[AnsweringStandIn],
    capsys: pytest.CaptureFixture[str],
    in_two_passes: tuple[bytes, dict[str, Sample]],
) -> None:
    """Neither answers that are there nor their features are asked for again."""
    server = servers[0]
    server.dies_after = 5
    assert run(run_file, exchange, [server], "regenerate.timeout=3", "regenerate.max_concurrency=1") == 2
    done = len((folder_of(run_file) / "regenerate" / "conversations.jsonl.partial").read_bytes().splitlines())
    assert 0 < done < COUNT
    before = len(server.answered)
    own = Ownership(owner=owner_of(folder_of(run_file))).beginning
    (exchange / f"{own}000000007.safetensors").write_bytes(b"half")
    server.dies_after = None
    assert run(run_file, exchange, [server]) == 0
    assert len(server.answered) - before == COUNT - done
    said = summary(run_file, "cache")
    assert (said["with answers"], said["asked again"]) == (COUNT, {})
    assert list(exchange.iterdir()) == []
    check(run_file, in_two_passes)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["cache.dtype=bfloat16", "target.layers=[2, 4, 6, 8]"])
def test_features_of_other_settings_are_discarded(
    run_file: Path, exchange: Path, servers: list[AnsweringStandIn], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(run_file, exchange, servers, stages="regenerate") == 0
    assert (folder_of(run_file) / "regenerate" / "features").exists()
    if change.startswith("target"):
        for server in servers:
            server.layers = (3, 5, 7, 9, server.layers[-1])
            states = server.states
            server.states = lambda ids, states=states: states(ids)[:, [0, 1, 2, 3, 5]]
    capsys.readouterr()
    assert run(run_file, exchange, servers, change) == 0
    message = capsys.readouterr().err
    assert "features that were received with answers are discarded: The cache was made for another" in message
    assert summary(run_file, "cache")["asked again"] == {"no features were kept": COUNT}
    assert sum(len(server.asked) for server in servers) == COUNT
    reader = HDF5Format().open(folder_of(run_file) / "cache", None)
    assert reader.header.dtype == ("bfloat16" if change.startswith("cache") else "float32")


@pytest.mark.slow
def test_one_cache_has_features_of_one_kind(
    run_file: Path,
    exchange: Path,
    servers: list[AnsweringStandIn],
    capsys: pytest.CaptureFixture[str],
    in_two_passes: tuple[bytes, dict[str, Sample]],
) -> None:
    """The cache stage goes on with what servers gave when the answers came."""
    servers[0].answer_faults = ["lost"]
    assert run(run_file, exchange, servers[:1], stages="regenerate") == 0
    servers[0].dtype = "bfloat16"
    assert run(run_file, exchange, servers[:1]) == 2
    assert "another number format than the others, or than this run began with" in capsys.readouterr().err
    servers[0].dtype = "float32"
    assert run(run_file, exchange, servers[:1]) == 0
    check(run_file, in_two_passes)


def test_keys_that_do_not_go_together(
    run_file: Path, exchange: Path, servers: list[AnsweringStandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*settings: str) -> str:
        assert run(run_file, exchange, servers, *settings) == 2
        return capsys.readouterr().err

    assert "no stage would use the features" in refused("features.mode=server", 'run.stages=["regenerate", "train"]')
    assert "answers that are generated in this process come without features" in refused("regenerate.servers=[]")
    assert "is not among features.servers" in refused("regenerate.servers=['http://127.0.0.1:9/v1']")
    assert "Set regenerate.features = true" in refused("regenerate.features=false")
    for server in servers:
        server.knows = "whole"
    assert "leaves a file for every answer" in refused()
    for server in servers:
        server.knows = "write"
    assert "does not give the features of a whole answer" in refused()
    assert list(exchange.iterdir()) == []
    for server in servers:
        server.max_model_len = 384 + 3
    assert "holds shorter texts" in refused()


def test_the_last_position_is_read() -> None:
    """Why an engine has to read an answer's last token: a draft is compared with the target's state behind it."""
    length = 9
    sample = Sample(id="s", input_ids=torch.arange(length), loss_mask=torch.arange(length) > 3, original_length=length)
    preparation = StepPreparation(num_steps=3, step_decay=0.8, normaliser="sequence")
    batch = preparation.collate([preparation.prepare(sample, np.random.default_rng(0))])
    assert int(batch["target_position"].max()) == length - 1


@pytest.mark.slow
def test_a_cache_that_was_begun_by_other_servers_does_not_go_on_with_what_was_kept(
    run_file: Path,
    exchange: Path,
    servers: list[AnsweringStandIn],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would hold features of two precisions, and no server would be asked for a comparison."""
    small = ("cache.shard_samples=2",)
    assert run(run_file, exchange, servers, *small, stages="regenerate") == 0
    exact = [server.states for server in servers]
    for server, states in zip(servers, exact, strict=True):
        server.states = lambda ids, states=states: states(ids).bfloat16().float()
    written, write = [], ShardedWriter.write

    def broken(self: ShardedWriter, sample: Sample) -> None:
        written.append(sample.id)
        if len(written) == 5:
            raise KeyboardInterrupt
        write(self, sample)

    monkeypatch.setattr(ShardedWriter, "write", broken)
    alone = ("regenerate.features=false", "regenerate.servers=[]", *small)
    assert run(run_file, exchange, servers, *alone, stages="cache") == 130
    monkeypatch.undo()
    assert run(run_file, exchange, servers, *small, stages="cache") == 0, "the same servers go on with it"
    assert "begun with features that servers gave at another time" in capsys.readouterr().err
    for name, sample in cached(folder_of(run_file) / "cache").items():
        assert sample.features is not None
        hidden = sample.features.hidden
        assert torch.equal(hidden, hidden.bfloat16().float()), name
