"""`deepspec evaluate --server`: whatever the command line gives changes what is asked, or is refused."""

from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from attrs import asdict

from deepspec_core.cli.evaluate import evaluate
from deepspec_core.cli.main import main
from deepspec_core.errors import ConfigError
from deepspec_core.pipeline import evaluating_server
from deepspec_core.pipeline.evaluating_server import Asked
from deepspec_core.pipeline.run import Run

ASKED = ["--target", "builtin:tiny-qwen3", "--task", "task.jsonl", "--temperature", "1"]
# Of every option that evaluate has, a value that is not its default.
VALUES: dict[str, str | None] = {
    "--draft": "lookup",
    "--target": "builtin:other",
    "--task": "gsm8k",
    "--temperature": "0.5",
    "--top-p": "0.4",
    "--top-k": "2",
    "--min-p": "0.3",
    "--repetition-penalty": "1.9",
    "--stop": "END",
    "--samples": "4",
    "--turns": "all",
    "--limit": "3",
    "--max-new-tokens": "5",
    "--batch-size": "2",
    "--confidence-threshold": "0.5",
    "--tree-nodes": "8",
    "--calibration": "calibration.json",
    "--cost-table": "profile.json",
    "--asynchronous": None,
    "--thinking": None,
    "--chat-template": "template.jinja",
    "--dtype": "float32",
    "--out": "elsewhere",
    "--force": "evaluate",
    "--server": "http://127.0.0.1:2",
    "--served-as": "another",
    "--api-key-env": "KEY",
    "--against": "own",
    "--no-plugin": "somebody",
}


@cache
def asked(*more: str) -> dict[str, Any]:
    """All that would be asked of the server; nothing where the command refuses."""
    found: dict[str, Any] = {}

    def keep(run: Run, said: Asked) -> None:
        found.update(asdict(run.file), asked=asdict(said))
        raise ConfigError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluating_server, "evaluate_server", keep)
        assert main(["evaluate", "--server", "http://127.0.0.1:1", *ASKED, *more]) == 2
    return found


def test_every_option_is_known_here() -> None:
    assert set(VALUES) == {one.opts[0] for one in evaluate.params if isinstance(one, click.Option)}


@pytest.mark.parametrize("option", sorted(set(VALUES) - {"--no-plugin"}))
def test_an_option_counts_or_is_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    value = VALUES[option]
    found = asked(option, *([] if value is None else [value]))
    assert found != asked()
    assert found or f"{option} has no effect on a server" in capsys.readouterr().err
