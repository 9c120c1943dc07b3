"""Exported drafts of every algorithm, served by llama.cpp: outputs are its own plain ones, and as many are accepted.

Its server runs in an environment of its own, on loopback, in fp32. DEEPSPEC_LLAMA_CPP=source takes one that is built
from its source.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import pytest
from engine_process import Engine, serving_llama_cpp
from target_gguf import write_target

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.interface.models import Target

pytest.importorskip("gguf")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
PROMPTS, TOKENS = 16, 96
ANSWERS = "regenerate"
# Of accepted lengths and of shares, by llama.cpp's own counters on the very prompts that this engine recorded.
BY_COUNTERS = 0.03
# What a wrong layer numbering or norm costs is more than this: such a draft is accepted about once in a while.
LEAST_ACCEPTED = 1.5
DRAFTS = {
    "dflash": ["draft.anchor_predicts=false"],
    # Accepted more than with the published terms, after so few steps.
    "dspark": ["loss.terms={ce=1.0,confidence=1.0}"],
    # llama.cpp's has Llama's layer and reads three of the target's.
    "eagle3": ['draft.layer.style="llama"', 'draft.count="labels"', "target.layers=[2, 6, 10]"],
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained(algorithm): the folder of a run of the quickstart's draft with fewer conversations, exported to gguf.

    The target's answers are those of the first run.
    """
    folder, done = tmp_path_factory.mktemp("llama-cpp"), list[str]()

    def train(algorithm: str) -> Path:
        if algorithm not in done:
            if done:
                shutil.copytree(
                    folder / f"quickstart-{done[0]}" / ANSWERS, folder / f"quickstart-{algorithm}" / ANSWERS
                )
            text = (QUICKSTART / f"{algorithm}.toml").read_text().replace("../../runs/", "")
            (folder / f"{algorithm}.toml").write_text(text.replace("limit = 2500", "limit = 900"))
            settings = ['run.stages=["regenerate", "cache", "train", "evaluate", "export"]', 'export.to=["gguf"]']
            settings += ["evaluate.temperature=[0.0]", f"evaluate.max_new_tokens={TOKENS}", f"evaluate.limit={PROMPTS}"]
            words = [word for one in (*settings, *DRAFTS[algorithm]) for word in ("--set", one)]
            assert main(["run", str(folder / f"{algorithm}.toml"), *words]) == 0
            done.append(algorithm)
        return folder / f"quickstart-{algorithm}"

    return train


@pytest.fixture(scope="session")
def target_file(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in target as GGUF."""
    out = tmp_path_factory.mktemp("target") / "tiny.gguf"
    write_target(Path(target.plugins.registry.load("builtin", "tiny-qwen3")()), out)
    return out


def _continued(server: Engine, prompt_ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The tokens that follow greedily, without the stop token."""
    # Without a sampler for it llama.cpp does not look at the temperature, and draws.
    body = {"prompt": list(prompt_ids), "n_predict": TOKENS, "temperature": 0.0, "cache_prompt": False}
    ids = json.loads(server.get("/completion", body | {"return_tokens": True, "samplers": ["temperature"]}))["tokens"]
    return _without_stop(ids, stop)


def _without_stop(ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    return [*ids][: next((index for index, token in enumerate(ids) if token in stop), len(ids))]


@pytest.mark.parametrize("algorithm", DRAFTS)
def test_outputs_are_plain_ones_and_as_many_are_accepted(
    trained: Callable[[str], Path], target: Target, target_file: Path, tmp_path: Path, algorithm: str
) -> None:
    run = trained(algorithm)
    rows = islice(target.plugins.registry.load("builtin", "tiny-dialogues")("held_out", seed=1), PROMPTS)
    draft, stop = ds.load_draft(run / "draft", target), target.architecture.stop_token_ids
    ours = list(ds.generate(target, draft, [row["messages"][0]["content"] for row in rows], max_new_tokens=TOKENS))
    with serving_llama_cpp(target_file, tmp_path / "plain.log") as server:
        plain = [_continued(server, answer.prompt_ids, stop) for answer in ours]
    assert [_without_stop(answer.ids, stop) for answer in ours] == plain

    record = json.loads((run / "export" / "gguf" / "export.json").read_text())["served_as"]
    assert record["method"] == algorithm
    options = ["-md", str(run / "export" / "gguf" / "draft.gguf"), "--spec-type", f"draft-{algorithm}"]
    options += ["--spec-draft-n-max", str(record["num_speculative_tokens"])]
    with serving_llama_cpp(target_file, tmp_path / "drafted.log", *options) as server:
        assert [_continued(server, answer.prompt_ids, stop) for answer in ours] == plain
        # Builds differ in what they call a model: its file's name, or its path.
        name = json.loads(server.get("/v1/models"))["data"][0]["id"]
        command = ["evaluate", str(run), "--server", server.address, "--served-as", name]
        assert main([*command, "--batch-size", "1"]) == 0
    _check_counted(json.loads((run / "served" / "metrics.json").read_text()), record["num_speculative_tokens"])


def _check_counted(report: dict[str, object], proposed: int) -> None:
    """Outputs token for token; accepted length and acceptance by position of llama.cpp's counters beside ours."""
    assert report["server"]["engine"] == "llama.cpp"  # type: ignore[index]
    (result,) = report["results"]  # type: ignore[misc]
    beside, counted = result["against"], result["counted"]
    lengths = f"{result['acceptance_length']:.3f} there, {beside['acceptance_length']:.3f} here"
    kept = f"{counted['kept_per_round']:.3f}, {beside['kept_per_round']:.3f}"
    print(f"accepted length {lengths}; tokens kept a round {kept}")  # noqa: T201
    print(f"by position {result['marginal']} there, {beside['by_position']} here; {result['rounds']} rounds")  # noqa: T201
    assert counted["speculates"] is True
    assert counted["disturbed"] is False
    assert (beside["compared"], beside["equal"]) == (PROMPTS, PROMPTS), beside["differing"]
    assert result["acceptance_length"] > LEAST_ACCEPTED
    assert counted["kept_per_round"] == pytest.approx(beside["kept_per_round"], rel=BY_COUNTERS)
    # Of an answer's last round this engine counts every right token, and llama.cpp may leave one out.
    last_rounds = PROMPTS / result["rounds"]
    assert abs(beside["acceptance_length"] - result["acceptance_length"]) <= last_rounds + BY_COUNTERS
    assert len(result["marginal"]) == len(beside["by_position"]) == proposed
    for theirs, ours in zip(result["marginal"], beside["by_position"], strict=True):
        assert ours - last_rounds - BY_COUNTERS <= theirs <= ours + BY_COUNTERS
