"""A base model, or a template with generation marks: the user's own chat template in place of the target's."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import deepspec_core as ds
from deepspec_core.cli.main import main
from deepspec_core.targets.opening import resolve_model

OWN = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\nMine: {{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def template(run_file: Path) -> Path:
    path = run_file.parent / "mine.jinja"
    path.write_text(OWN)
    return path


@pytest.fixture
def base_model(tmp_path: Path, target: Any) -> Path:
    """The built-in target without its chat template."""
    folder = tmp_path / "base"
    shutil.copytree(resolve_model("builtin:tiny-qwen3", base=tmp_path, registry=target.plugins.registry), folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_run_renders_by_it_and_sees_it_change(
    run_file: Path, template: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--set", 'target.chat_template="mine.jinja"', "--set", "run.threads=1"]
    assert main(["data", "show", str(run_file), "-n", "1", *command]) == 0
    assert "Mine: " in capsys.readouterr().out
    run = ["run", str(run_file), "--smoke", *command, "--set", 'run.stages=["regenerate", "cache", "train"]']
    assert main(run) == 0
    manifest = run_file.parent / "runs" / "quickstart-dflash-smoke" / "cache" / "manifest.json"
    made = json.loads(manifest.read_text())["header"]["template"]
    capsys.readouterr()
    template.write_text(OWN.replace("Mine", "Yours"))
    assert main(run) == 2
    assert "The file of target.chat_template changed after the stage" in capsys.readouterr().err
    assert main(["run", str(run_file), "--smoke", "--dry-run"]) == 2
    assert "`target.chat_template` changed" in capsys.readouterr().err
    assert made


def test_a_base_model_can_be_used(
    base_model: Path, template: Path, drafts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["--max-new-tokens", "4", "Count from 3 to 9."]
    assert main(["generate", "--target", str(base_model), *prompt]) == 2
    assert "target.chat_template" in capsys.readouterr().err
    assert main(["generate", "--target", str(base_model), "--chat-template", str(template), *prompt]) == 0
    target = ds.load_target(base_model, chat_template=template)
    (found,) = ds.generate(target, None, ["Hi"], max_new_tokens=2)
    assert "Mine: Hi" in target.tokenizer.decode(found.prompt_ids)
    task = tmp_path / "task.jsonl"
    task.write_text('{"turns": ["Count from 3 to 9."]}\n')
    evaluate = ["evaluate", "--draft", str(drafts["dflash"]), "--target", str(base_model), "--task", str(task)]
    evaluate += ["--chat-template", str(template), "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    assert main(evaluate) == 0


@pytest.mark.parametrize(("text", "says"), [(None, "cannot be read"), ("", "is empty"), ("{% if %}", "line 1")])
def test_a_template_that_is_none_is_said_before_the_first_stage(
    run_file: Path, capsys: pytest.CaptureFixture[str], text: str | None, says: str
) -> None:
    if text is not None:
        (run_file.parent / "mine.jinja").write_text(text)
    assert main(["run", str(run_file), "--smoke", "--set", 'target.chat_template="mine.jinja"']) == 2
    seen = capsys.readouterr()
    assert says in seen.err
    assert "starting" not in seen.out
