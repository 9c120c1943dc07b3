"""The Python interface, and the page that explains it; `deepspec generate`, which is built on it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspec_core
from deepspec_core.checkpoints.published import save_draft
from deepspec_core.cli.main import main
from deepspec_core.decoding.engine import Committed
from deepspec_core.decoding.text_stream import TextStream

PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"
TINY = "builtin:tiny-qwen3"
QUESTIONS = ["What is 17 + 25?", "Count from 3 to 9.", "Tell me a story about a fox."]


@pytest.fixture(scope="module")
def target() -> Any:
    return deepspec_core.load_target(TINY)


@pytest.fixture(scope="module")
def drafts(target: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every algorithm for the built-in target, with weights as they are drawn."""
    folder = tmp_path_factory.mktemp("drafts")
    registry = target.plugins.registry
    for name in ("dflash", "dspark", "eagle3"):
        torch.manual_seed(3)
        spec = registry.get("draft", name)
        draft = registry.load("draft", name)(spec.options(), target.adapter, (2, 6, 10))
        draft.adopt(target.model.embedding_weight(), target.model.head_weight())
        save_draft(draft, target.adapter, folder / name)
    return {name: folder / name for name in ("dflash", "dspark", "eagle3")}


def test_importing_the_package_is_cheap() -> None:
    code = (
        "import sys, deepspec_core; assert 'torch' not in sys.modules and 'pluggy' not in sys.modules;"
        "print(*sorted(name for name in dir(deepspec_core) if not name.startswith('_')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(deepspec_core.__all__)
    assert len(deepspec_core.__all__) <= 10
    assert all(getattr(deepspec_core, name).__doc__ for name in deepspec_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod_target'"):
        _ = deepspec_core.lod_target  # type: ignore[attr-defined]


def test_the_page_s_own_snippets_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 5
    decoding = snippets[0].strip().splitlines()
    assert len(decoding) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart-dflash").mkdir(parents=True)
    finished_draft = finished.parent / "runs" / "quickstart-dflash-smoke" / "draft"
    (tmp_path / "runs" / "quickstart-dflash" / "draft").symlink_to(finished_draft)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS))
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    output = capsys.readouterr().out
    assert output.count("accepted length") == 3
    assert "questions.jsonl" in output
    assert (tmp_path / "runs" / "notebook-smoke" / "draft" / "model.safetensors").exists()
    assert "tiny-qwen3" in output.splitlines()[-1]


@pytest.mark.parametrize("algorithm", ["dflash", "dspark", "eagle3"])
def test_a_draft_changes_no_output_and_neighbours_none(algorithm: str, target: Any, drafts: dict[str, Path]) -> None:
    draft = deepspec_core.load_draft(drafts[algorithm], target)
    plain = deepspec_core.generate(target, None, QUESTIONS, max_new_tokens=24)
    for batch_size in (1, 3):
        found = deepspec_core.generate(target, draft, QUESTIONS, max_new_tokens=24, batch_size=batch_size)
        assert [one.ids for one in found] == [one.ids for one in plain]
        assert [one.text for one in found] == [one.text for one in plain]
        assert all(one.rounds for one in found)
    assert all(one.accepted_length == 1 for one in plain)


def test_prompts_come_as_text_messages_or_ids(target: Any) -> None:
    [text] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=8)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    assert deepspec_core.generate(target, None, messages, max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, [messages], max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, list(text.prompt_ids), max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, [torch.tensor(text.prompt_ids)], max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, []) == []


def test_what_is_told_round_by_round_is_the_output(target: Any, drafts: dict[str, Path]) -> None:
    told: list[Committed] = []
    draft = deepspec_core.load_draft(drafts["eagle3"], target)
    found = deepspec_core.generate(
        target, draft, QUESTIONS, max_new_tokens=20, batch_size=2, temperature=1.0, on_round=told.append
    )
    for index, one in enumerate(found):
        assert tuple(token for part in told if part.id == str(index) for token in part.ids) == one.ids
    assert all(0 <= part.accepted <= len(part.ids) for part in told)


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ("", {}, ("a prompt is empty", "prompt 0")),
        (["fine", []], {}, ("a prompt is empty", "prompt 1")),
        ([[1, 99_999]], {}, ("outside the vocabulary", "99999")),
        ([[1] * 5000], {}, ("no room to answer", "5,000 tokens")),
        ([[{"content": "x"}]], {}, ("a message has no role",)),
        ([[{"role": "assistant", "content": "x"}]], {}, ("ends with the assistant",)),
        ("x", {"max_new_tokens": 0}, ("out of range", "max_new_tokens")),
        ("x", {"temperature": -1.0}, ("out of range", "temperature")),
        ("x", {"batch_size": 0}, ("out of range", "batch_size")),
        ("x", {"seed": -1}, ("out of range", "seed")),
    ],
)
def test_mistakes_are_told(target: Any, prompts: Any, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(deepspec_core.DeepSpecError) as caught:
        deepspec_core.generate(target, None, prompts, **options)
    for part in parts:
        assert part in str(caught.value)


def test_models_that_do_not_fit_are_refused(target: Any, tiny_target: Callable[..., Any], tmp_path: Path) -> None:
    where = tmp_path / "other"
    shutil.copytree(tiny_target("llama", vocab_size=1024).where, where)
    target.tokenizer.save_pretrained(where)
    other = deepspec_core.load_target(str(where), dtype="bfloat16")
    assert other.model.dtype == torch.bfloat16
    spec = other.plugins.registry.get("draft", "dflash")
    options = spec.options(mask_token_id=1, num_layers=1)
    draft = other.plugins.registry.load("draft", "dflash")(options, other.adapter, (0, 1))
    save_draft(draft, other.adapter, tmp_path / "draft")
    with pytest.raises(deepspec_core.DeepSpecError, match="made for another target"):
        deepspec_core.load_draft(tmp_path / "draft", target)
    with pytest.raises(deepspec_core.DeepSpecError, match="no draft checkpoint there"):
        deepspec_core.load_draft("./nothing", target)
    with pytest.raises(deepspec_core.DeepSpecError, match="tiny-qwen3"):
        deepspec_core.load_target("builtin:tiny-qwen")
    with pytest.raises(deepspec_core.DeepSpecError, match="no such device"):
        deepspec_core.load_target(TINY, device="toaster")
    assert deepspec_core.load_draft(tmp_path / "draft", other).description.algorithm == "dflash"


def test_a_run_file_from_a_dictionary_is_checked_as_toml(tmp_path: Path) -> None:
    with pytest.raises(deepspec_core.DeepSpecError) as caught:
        deepspec_core.RunFile.from_dict({"run": {"name": 3}, "target": {}, "dta": {}})
    assert "problems in the run file" in str(caught.value)
    assert "dta" in str(caught.value)
    assert "write 'data'" in str(caught.value)
    assert "text in quotes" in str(caught.value)


def test_evaluating_a_loaded_draft(target: Any, drafts: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "questions.jsonl"
    task.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS))
    draft = deepspec_core.load_draft(drafts["dflash"], target)
    found = deepspec_core.evaluate(target, draft, str(task), temperature=[0.0, 1.0], max_new_tokens=12)
    assert [(one.temperature, one.prompts) for one in found] == [(0.0, 3), (1.0, 3)]
    assert found[0].figures["mismatches"] == []
    assert found[0].speedup is not None
    with pytest.raises(deepspec_core.DeepSpecError, match="held-out"):
        deepspec_core.evaluate(target, draft, "held-out")
    with pytest.raises(deepspec_core.DeepSpecError, match="batch_size"):
        deepspec_core.evaluate(target, draft, str(task), batch_size=0)


def test_the_command_streams_the_same_text(
    target: Any, drafts: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--target", TINY, "--max-new-tokens", "24", QUESTIONS[0]]
    [expected] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=24)
    for more in ([], ["--draft", str(drafts["dspark"])]):
        assert main([*arguments, *more]) == 0
        seen = capfd.readouterr()
        assert seen.out == expected.text + "\n"
        assert "tokens/s" in seen.err
    assert "accepted length" in seen.err
    assert "the two outputs are equal, token for token" in seen.err
    assert main([*arguments, "--json", "--draft", str(drafts["dspark"])]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ids"] == list(expected.ids)
    assert report["plain"]["same_ids"] is True
    assert sum(one["committed"] for one in report["rounds"]) >= len(report["ids"]) - 1


def test_accepted_tokens_are_coloured_by_round(
    target: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    from deepspec_core.cli import generate as command

    plain_echo = click.echo
    monkeypatch.setattr(command.click, "echo", lambda text="", **rest: plain_echo(text, **{**rest, "color": True}))
    stream = command._Stream(target)
    one, two, three = (target.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("a", "b", "c"))
    stream(Committed("0", (one, two), 1))
    stream(Committed("0", (three,), 1))
    stream.end()
    expected = click.style("a", fg="green") + "b" + click.style("c", fg="cyan") + "\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "the prompt is empty"),
        (["word " * 5000], "no room to answer"),
        (["x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["x", "--draft", "./nothing"], "no draft checkpoint there"),
        (["x", "--dtype", "int4"], "dtype"),
    ],
)
def test_the_command_s_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", TINY, *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


def test_text_comes_in_whole_characters(target: Any) -> None:
    tokenizer = target.tokenizer
    for text in ("plain words", "naïve Ωμέγα 漢字 🦊🦊 end", "🦊"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(lambda part: str(tokenizer.decode(list(part), skip_special_tokens=True)))
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.rest() == str(tokenizer.decode(ids, skip_special_tokens=True))
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
