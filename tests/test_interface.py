"""The Python interface, and the page that explains it."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

import deepspec_core
from deepspec_core.checkpoints.published import save_draft
from deepspec_core.decoding.text_stream import TextStream
from deepspec_core.interface import generating
from deepspec_core.interface.generating import Streamed
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer

PARITY = Path(__file__).parent / "parity"
PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"
TINY = "builtin:tiny-qwen3"
QUESTIONS = ["What is 17 + 25?", "Count from 3 to 9.", "Tell me a story about a fox."]


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


@pytest.mark.slow
def test_the_page_s_own_snippets_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 6
    decoding = snippets[0].strip().splitlines()
    assert len(decoding) <= 10
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    finished_draft = finished.parent / "runs" / "quickstart-dflash-smoke" / "draft"
    (tmp_path / "runs" / "quickstart" / "draft").symlink_to(finished_draft)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS))
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), names)
    output = capsys.readouterr().out
    assert output.count("accepted length") == 3
    assert len(re.findall(r"questions.jsonl 0.0 .*x$", output, re.MULTILINE)) == 1
    assert len(re.findall(r"^mine 1.0 .*x$", output, re.MULTILINE)) == 1
    assert (tmp_path / "runs" / "notebook-smoke" / "draft" / "model.safetensors").exists()
    assert "tiny-qwen3" in output.splitlines()[-1]


@pytest.fixture(scope="module")
def recorded_target(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The target that the recorded drafts were trained for. They propose tokens that it accepts."""
    where = tmp_path_factory.mktemp("recorded") / "target"
    shutil.copytree(PARITY / "qwen3-target", where)
    tiny_tokenizer().save_pretrained(where)
    return deepspec_core.load_target(where)


@pytest.mark.parametrize("algorithm", ["dflash", "dspark", "eagle3"])
def test_a_draft_changes_no_output_and_neither_do_neighbours(algorithm: str, recorded_target: Any) -> None:
    case = PARITY / f"qwen3-decode-{algorithm}"
    samples = json.loads((case / "case.json").read_text())["by_confidence_threshold"]["0.0"]["samples"]
    prompts = [sample["prompt"] for sample in samples]
    draft = deepspec_core.load_draft(case / "draft", recorded_target)
    plain = deepspec_core.generate(recorded_target, None, prompts, max_new_tokens=24)
    assert all(one.accepted_length in (0, 1) for one in plain)
    for batch_size in (1, 3):
        found = deepspec_core.generate(recorded_target, draft, prompts, max_new_tokens=24, batch_size=batch_size)
        assert [(one.ids, one.text, one.finish_reason) for one in found] == [
            (one.ids, one.text, one.finish_reason) for one in plain
        ]
        assert any(one.accepted_length > 1.2 for one in found), "or nothing was tested"
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 5}
    alone, together = (
        [one.ids for one in deepspec_core.generate(recorded_target, draft, prompts, batch_size=size, **options)]
        for size in (1, 4)
    )
    assert alone == together
    assert alone != [one.ids for one in plain]


def test_rounds_account_for_the_answer(recorded_target: Any) -> None:
    case = PARITY / "qwen3-decode-dspark"
    draft = deepspec_core.load_draft(case / "draft", recorded_target)
    for one in deepspec_core.generate(recorded_target, draft, [[5, 9, 12], [7, 3]], max_new_tokens=16):
        # The first token comes with the prompt.
        assert 1 + sum(r.committed for r in one.rounds) >= len(one.ids)
        assert 1 + sum(r.committed for r in one.rounds[:-1]) <= 16
        assert one.accepted_length == sum(r.committed for r in one.rounds) / len(one.rounds)
        for r in one.rounds:
            assert r.accepted <= r.proposed <= draft.description.max_tokens
            assert r.committed - r.accepted in (0, 1)
            assert r.confidence is not None
            assert len(r.confidence) == r.proposed
            assert all(0 <= value <= 1 for value in r.confidence)


def test_prompts_come_as_text_messages_or_ids(target: Any) -> None:
    [text] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=8)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    assert deepspec_core.generate(target, None, messages, max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, [messages], max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, list(text.prompt_ids), max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, [torch.tensor(text.prompt_ids)], max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, torch.tensor(text.prompt_ids), max_new_tokens=8) == [text]
    assert deepspec_core.generate(target, None, np.array([text.prompt_ids] * 2), max_new_tokens=8) == [text, text]
    assert deepspec_core.generate(target, None, (one for one in QUESTIONS[:1]), max_new_tokens=np.int64(8)) == [text]
    assert deepspec_core.generate(target, None, []) == []


def test_ids_need_no_chat_template(target: Any) -> None:
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = None
    base = evolve(target, tokenizer=tokenizer)
    ids = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=4)[0].prompt_ids
    assert len(deepspec_core.generate(base, None, [list(ids)], max_new_tokens=4)) == 1
    with pytest.raises(deepspec_core.DeepSpecError, match="no chat template"):
        deepspec_core.generate(base, None, QUESTIONS[0], max_new_tokens=4)


def test_what_is_told_round_by_round_is_the_output(target: Any, drafts: dict[str, Path]) -> None:
    told: list[Streamed] = []
    draft = deepspec_core.load_draft(drafts["eagle3"], target)
    found = deepspec_core.generate(
        target, draft, QUESTIONS, max_new_tokens=20, batch_size=2, temperature=1.0, on_round=told.append
    )
    for index, one in enumerate(found):
        parts = [part for part in told if part.prompt == index]
        assert tuple(token for part in parts for token in part.ids) == one.ids
        assert "".join(part.text for part in parts) == one.text
    assert all(0 <= part.accepted <= len(part.ids) for part in told)


def test_half_a_character_at_the_end_is_told_too(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Streamed] = []
    [whole] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=3)

    def decode(ids: list[int], **_: Any) -> str:
        """Three tokens a character."""
        complete, left = divmod(len(ids), 3)
        return "x" * complete + "\N{REPLACEMENT CHARACTER}" * (left > 0)

    tokenizer = copy.copy(target.tokenizer)
    monkeypatch.setattr(tokenizer, "decode", decode)
    changed = evolve(target, tokenizer=tokenizer)
    ids = list(whole.prompt_ids)
    [one] = deepspec_core.generate(changed, None, [ids], max_new_tokens=4, on_round=told.append)
    assert [part.text for part in told] == ["", "", "x", "", "\N{REPLACEMENT CHARACTER}"]
    assert one.text == "x\N{REPLACEMENT CHARACTER}"


def test_seconds_are_those_of_decoding(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 1
        return now

    def slow(_part: Streamed) -> None:
        nonlocal now
        now += 1000

    monkeypatch.setattr(generating, "time", SimpleNamespace(perf_counter=tick))
    [quiet] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=3)
    [told] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=3, on_round=slow)
    assert 0 < quiet.seconds <= told.seconds < 100


@pytest.mark.parametrize(
    ("prompts", "options", "parts"),
    [
        ("", {}, ("a prompt is empty", "prompt 0")),
        (" \n", {}, ("a prompt is empty", "prompt 0")),
        (["fine", []], {}, ("a prompt is empty", "prompt 1")),
        (None, {}, ("neither a prompt nor a list", "NoneType")),
        ({"role": "user", "content": "x"}, {}, ("neither a prompt nor a list", "fix:", "into a list")),
        (["fine", None], {}, ("not a prompt", "prompt 1", "NoneType")),
        (b"hi", {}, ("not a prompt", "prompt 0", "bytes")),
        (["fine", b"hi"], {}, ("not a prompt", "prompt 1", "bytes")),
        ([[1, "a"]], {}, ("not whole numbers", "'a'")),
        ([[True]], {}, ("not whole numbers", "True")),
        ([[1, 99_999]], {}, ("outside the vocabulary", "99999")),
        ([[1] * 5000], {}, ("no room to answer", "5,000 tokens")),
        ([[{"content": "x"}]], {}, ("no known role", "prompt 0 messages[0]")),
        ([[{"role": "usr", "content": "x"}]], {}, ("no known role", "Is 'user' meant?")),
        ([[{"role": "user", "content": 3}]], {}, ("content is not text",)),
        ([[{"role": "user", "content": "x"}, "y"]], {}, ("not an object", "messages[1]")),
        ([[{"role": "assistant", "content": "x"}]], {}, ("ends with the assistant",)),
        ("\udcff", {}, ("not valid Unicode", "prompt 0")),
        ("x", {"max_new_tokens": 2.5}, ("1 problem in the arguments of generate", "max_new_tokens", "a whole number")),
        ("x", {"temperature": "0.5"}, ("temperature", "a number")),
        ("x", {"temperature": float("nan")}, ("temperature", "a finite number")),
        ("x", {"system_prompt": 5}, ("system_prompt",)),
        ("x", {"seed": -1, "temperature": -1.0, "batch_size": 0}, ("3 problems", "seed", "temperature", "batch_size")),
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
    with pytest.raises(deepspec_core.DeepSpecError, match="no draft checkpoint in this directory"):
        deepspec_core.load_draft("./nothing", target)
    with pytest.raises(deepspec_core.DeepSpecError, match="tiny-qwen3"):
        deepspec_core.load_target("builtin:tiny-qwen")
    with pytest.raises(deepspec_core.DeepSpecError, match="no such device"):
        deepspec_core.load_target(TINY, device="toaster")
    with pytest.raises(deepspec_core.DeepSpecError, match="write 'bfloat16'"):
        deepspec_core.load_target(TINY, dtype="bf16")
    opened = deepspec_core.load_draft(tmp_path / "draft", other)
    assert opened.description.algorithm == "dflash"
    with pytest.raises(deepspec_core.DeepSpecError, match=r"`hidden_size` differs.*`dtype` differs"):
        deepspec_core.generate(target, opened, QUESTIONS)
    for wrong in (str(tmp_path / "draft"), other):
        with pytest.raises(deepspec_core.DeepSpecError, match="not a loaded draft"):
            deepspec_core.generate(other, wrong, QUESTIONS)  # type: ignore[arg-type]
    with pytest.raises(deepspec_core.DeepSpecError, match="not a loaded target"):
        deepspec_core.load_draft(tmp_path / "draft", TINY)  # type: ignore[arg-type]


def test_a_run_file_from_a_dictionary_is_checked_as_toml(tmp_path: Path) -> None:
    with pytest.raises(deepspec_core.DeepSpecError) as caught:
        deepspec_core.RunFile.from_dict({"run": {"name": 3}, "target": {}, "dta": {}})
    assert "problems in the run file" in str(caught.value)
    assert "dta" in str(caught.value)
    assert "write 'data'" in str(caught.value)
    assert "text in quotes" in str(caught.value)
    with pytest.raises(deepspec_core.DeepSpecError, match="a nested mapping"):
        deepspec_core.RunFile.from_dict([1])  # type: ignore[arg-type]
    run = {"name": "x", "output": tmp_path, "stages": ("train",)}
    tables = {"run": run, "target": {"model": TINY, "layers": np.array([2, 4])}, "draft": {"type": "eagle3"}}
    data = {"sources": [{"path": "builtin:tiny-dialogues"}], "system_prompt": None}
    file = deepspec_core.RunFile.from_dict({**tables, "data": data, "train": {"lr": np.float64(0.5)}})
    assert (file.target.layers, file.train.lr, file.run.output) == ((2, 4), 0.5, str(tmp_path))
    with pytest.raises(deepspec_core.DeepSpecError, match="missing section"):
        deepspec_core.train(tables)


def test_evaluating_a_loaded_draft(target: Any, drafts: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "questions.jsonl"
    task.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS))
    draft = deepspec_core.load_draft(drafts["dflash"], target)
    found = deepspec_core.evaluate(target, draft, str(task), temperature=[0.0, 1.0], max_new_tokens=12)
    assert [(one.temperature, one.prompts) for one in found] == [(0.0, 3), (1.0, 3)]
    assert found[0].figures["mismatches"] == []
    assert found[0].speedup is not None
    assert [one.mismatches for one in found] == [(), None]
    own = deepspec_core.evaluate(target, draft, {"mine": QUESTIONS}, temperature=0, max_new_tokens=12, plain=False)
    assert [(one.task, one.prompts, one.speedup) for one in own] == [("mine", 3, None)]
    assert own[0].accepted_length == found[0].accepted_length
    task.write_text(task.read_text() + json.dumps({"turns": ["word " * 5000]}) + "\n")
    [short] = deepspec_core.evaluate(target, draft, [task], max_new_tokens=1, plain=False)
    assert (short.prompts, short.prompts_too_long, short.temperature) == (3, 1, 1.0)
    with pytest.raises(deepspec_core.DeepSpecError, match="no temperature to evaluate at"):
        deepspec_core.evaluate(target, draft, {"own": ["x"]}, temperature=[])
    with pytest.raises(deepspec_core.DeepSpecError, match="no tasks to evaluate on"):
        deepspec_core.evaluate(target, draft, [])
    with pytest.raises(deepspec_core.DeepSpecError, match="held-out"):
        deepspec_core.evaluate(target, draft, "held-out")
    with pytest.raises(deepspec_core.DeepSpecError, match="batch_size"):
        deepspec_core.evaluate(target, draft, str(task), batch_size=0)


def test_text_comes_in_whole_characters(target: Any) -> None:
    tokenizer = target.tokenizer
    for text in ("plain words", "naïve Ωμέγα 漢字 🦊🦊 end", "🦊"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(lambda part: str(tokenizer.decode(list(part), skip_special_tokens=True)))
        pieces = [stream.push(token) for token in ids]
        assert "".join(pieces) + stream.rest() == str(tokenizer.decode(ids, skip_special_tokens=True))
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
