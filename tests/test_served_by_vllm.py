"""An exported Eagle3 draft, served by vLLM on the CPU: its outputs are vLLM's own plain ones, and as many are accepted.

vLLM runs in an environment of its own, as a server on loopback. Its CPU build serves DFlash too; DSpark needs a GPU.
"""

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import pytest
from engine_process import Engine, serving_vllm
from jsonschema import Draft202012Validator

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.evaluation.metrics_file import schema
from deepspec_core.interface.models import Target

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "eagle3.toml"
PROMPTS, TOKENS = 16, 96
# Rounds end otherwise at a limit and at a stop token; outputs are equal, and so are proposals but for rounding.
SHARE_APART = 0.05
# Of accepted lengths and of shares, by vLLM's own counters on the very prompts that this engine recorded.
BY_COUNTERS = 0.03
# What a wrong layer numbering or norm costs is more than this: such a draft is accepted about once in a while.
LEAST_ACCEPTED = 1.5


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the quickstart's Eagle3 with fewer conversations, exported to vllm."""
    folder = tmp_path_factory.mktemp("eagle3")
    text = QUICKSTART.read_text().replace("../../runs/quickstart-eagle3", "run").replace("limit = 2500", "limit = 900")
    (folder / "eagle3.toml").write_text(text.replace("ttt_length = 5 ", 'count = "labels"\nttt_length = 5 '))
    settings = [
        'run.stages=["regenerate", "cache", "train", "evaluate", "export"]',
        'export.to=["vllm", "speculators"]',
    ]
    settings += ["evaluate.temperature=[0.0]", f"evaluate.max_new_tokens={TOKENS}", f"evaluate.limit={PROMPTS}"]
    command = ["run", str(folder / "eagle3.toml"), *(word for text in settings for word in ("--set", text))]
    assert main(command) == 0
    return folder / "run"


def _continued(server: Engine, prompt_ids: Sequence[int]) -> list[int]:
    """The tokens that follow greedily."""
    body = {"prompt": list(prompt_ids), "max_tokens": TOKENS, "temperature": 0.0, "return_token_ids": True}
    return list(json.loads(server.get("/v1/completions", body))["choices"][0]["token_ids"])


def _counted(server: Engine, name: str) -> float:
    """The sum of one of vLLM's counters."""
    found = re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? ([\d.e+]+)$", server.get("/metrics"), re.MULTILINE)
    assert found, f"vLLM counts {name}"
    return sum(map(float, found))


def _without_stop(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    return [*ids][: next((index for index, token in enumerate(ids) if token in stop), len(ids))]


def test_outputs_are_plain_ones_and_as_many_are_accepted(trained: Path, target: Target, tmp_path: Path) -> None:
    registry = target.plugins.registry
    where = Path(registry.load("builtin", "tiny-qwen3")())
    rows = islice(registry.load("builtin", "tiny-dialogues")("held_out", seed=1), PROMPTS)
    questions = [row["messages"][0]["content"] for row in rows]
    draft = ds.load_draft(trained / "draft", target)
    ours = list(ds.generate(target, draft, questions, max_new_tokens=TOKENS))
    rounds = [one for answer in ours for one in answer.rounds]
    our_length = 1 + sum(one.accepted for one in rounds) / len(rounds)
    assert our_length > LEAST_ACCEPTED

    stop = target.architecture.stop_token_ids
    with serving_vllm(where, tmp_path / "plain.log") as server:
        plain = [_without_stop(_continued(server, answer.prompt_ids), stop) for answer in ours]
    for name in ("vllm", "speculators"):
        folder = trained / "export" / name
        asked = {"method": "eagle3", "model": str(folder), "num_speculative_tokens": 5}
        options = ("--speculative-config", json.dumps(asked))
        with serving_vllm(where, tmp_path / f"{name}.log", *options) as server:
            drafted = [_without_stop(_continued(server, answer.prompt_ids), stop) for answer in ours]
            drafts = _counted(server, "spec_decode_num_drafts_total")
            accepted = _counted(server, "spec_decode_num_accepted_tokens_total")
        assert drafted == plain, name
        their_length = 1 + accepted / drafts
        print(f"{name}: {their_length:.2f} by vLLM, {our_length:.2f} here, {int(drafts)} rounds")  # noqa: T201
        assert abs(their_length / our_length - 1) < SHARE_APART, name
    assert [_without_stop(answer.ids, stop) for answer in ours] == plain


def test_an_evaluation_by_its_counters_is_this_engines(trained: Path, target: Target, tmp_path: Path) -> None:
    """`deepspec evaluate --server`: outputs token for token, accepted length and acceptance by position beside ours."""
    where = Path(target.plugins.registry.load("builtin", "tiny-qwen3")())
    asked = {"method": "eagle3", "model": str(trained / "export" / "vllm"), "num_speculative_tokens": 5}
    with serving_vllm(where, tmp_path / "counted.log", "--speculative-config", json.dumps(asked)) as server:
        command = ["evaluate", str(trained), "--server", server.address, "--served-as", str(where)]
        assert main([*command, "--batch-size", "1"]) == 0
    report = json.loads((trained / "served" / "metrics.json").read_text())
    assert list(Draft202012Validator(schema()).iter_errors(report)) == []
    assert report["server"]["engine"] == "vLLM"
    assert report["server"]["returns_token_ids"] is True
    (result,) = report["results"]
    beside, counted = result["against"], result["counted"]
    print(result["acceptance_length"], beside["acceptance_length"], result["marginal"], beside["by_position"])  # noqa: T201
    assert counted["speculates"] is True
    assert counted["disturbed"] is False
    assert (beside["compared"], beside["equal"]) == (PROMPTS, PROMPTS), beside["differing"]
    assert counted["kept_per_round"] == pytest.approx(beside["kept_per_round"], rel=BY_COUNTERS)
    # vLLM counts tokens that it accepts after a stop token, and this engine those after a limit.
    after_the_end = result["acceptance_length"] - counted["kept_per_round"]
    after_the_limit = beside["acceptance_length"] - beside["kept_per_round"]
    assert after_the_end * result["rounds"] <= 5 * PROMPTS
    assert len(result["marginal"]) == len(beside["by_position"]) == 5
    for theirs, ours in zip(result["marginal"], beside["by_position"], strict=True):
        assert ours - after_the_limit - BY_COUNTERS <= theirs <= ours + after_the_end + BY_COUNTERS
