"""The command line as users meet it: exit codes, messages on stderr, and nothing heavy imported on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli import main as command_line
from deepspec_core.cli.main import execute, main, run_main
from deepspec_core.config.load import load_run_file
from deepspec_core.errors import TargetError
from deepspec_core.plugins.discovery import load_plugins

RUN = """
[run]
name = "a"
output = "out"
stages = ["train"]
[target]
model = "m"
layers = [1]
[data]
sources = [{path = "x"}]
[draft]
type = "toy"
"""


@pytest.fixture
def run_file(tmp_path: Path, toy: Any) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def test_plugins_lists_what_each_offers_and_why_one_was_left_out(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy.add("fake-broken", "raise ValueError('no luck')\n")
    assert main(["plugins", "--no-plugin", "fake-toy"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["PLUGIN", "PACKAGE", "VERSION", "STATUS"]
    assert ["core", "deepspec-core", load_plugins().versions()["deepspec-core"], "ok"] in lines
    assert ["loss", "ce", "cross-entropy", "of", "the", "draft", "at", "the", "label"] in lines
    assert ["fake-toy", "fake-toy", "1.0", "blocked"] in lines
    broken = lines.index(["fake-broken", "fake-broken", "1.0", "broken"])
    assert lines[broken + 1][:4] == ["reason", "ValueError:", "no", "luck"]


def test_plugins_as_json(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    toy.add("fake-broken", "raise ValueError('no luck')\n", version="0.3")
    assert main(["plugins", "--json"]) == 0
    by_package = {entry["package"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert by_package["fake-toy"] == {
        "name": "fake-toy",
        "package": "fake-toy",
        "version": "1.0",
        "status": "ok",
        "reason": None,
        "offers": {"draft": ["toy"]},
        "summaries": {"draft": ["a toy"]},
        "slow": [],
    }
    broken = by_package["fake-broken"]
    assert (broken["status"], broken["version"], broken["offers"]) == ("broken", "0.3", {})
    assert broken["reason"].startswith("ValueError: no luck")


def test_plugins_says_which_one_makes_every_command_slow(distributions: Any) -> None:
    distributions.add("fake-heavy", "import torch\n")
    distributions.add("fake-light", "import json\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(distributions.folder), *sys.path])}
    command = [sys.executable, "-m", "deepspec_core", "plugins"]
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    [slow] = [number for number, line in enumerate(lines) if line.split()[:1] == ["slow"]]
    assert lines[slow - 1].split() == ["fake-heavy", "fake-heavy", "1.0", "ok"]
    assert "every command waits while its plugin module imports torch" in lines[slow]


def test_a_command_that_a_plugin_may_have(distributions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    distributions.add("fake-broken", "raise ValueError('no luck')\n")
    assert main(["polish"]) == 2
    said = capsys.readouterr().err
    assert "No such command 'polish'" in said
    assert "It may be a command of a plugin that is not installed" in said
    assert "Plugin 'fake-broken' of fake-broken is broken: ValueError: no luck" in said


def test_plugins_shows_both_sides_of_a_duplicate(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = (toy.folder / "fake_toy_plugin.py").read_text().partition("\n")[2]
    toy.add("fake-twin", source)
    assert main(["plugins"]) == 0
    shown = capsys.readouterr().out
    assert "draft type 'toy' is also offered by fake-twin 1.0" in shown
    assert "draft type 'toy' is also offered by fake-toy 1.0" in shown
    assert shown.count("duplicate") == 2


def test_a_misspelled_plugin_to_leave_out_is_an_error(toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", "--no-plugin", "fake-to"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "write 'fake-toy'" in captured.err


def test_config_show_prints_a_run_file_that_loads_to_the_same(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(run_file), "--set", "train.lr=3e-4", "--set", "run.name=b"]) == 0
    again = run_file.with_name("again.toml")
    again.write_text(capsys.readouterr().out)
    plugins = load_plugins()
    expected = load_run_file(run_file, overrides=["train.lr=3e-4", "run.name=b"], plugins=plugins)
    assert load_run_file(again, plugins=plugins) == expected


def test_config_check(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", str(run_file)]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["config", "check", str(run_file), "--set", "train.lrr=1", "--set", "draft.block_size='x'"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"Error: 2 problems in {run_file}")
    for part in ("train.lrr", "write 'lr'", "draft.block_size", '"x" (text)', "a whole number"):
        assert part in captured.err
    assert main(["config", "check", str(run_file), "--no-plugin", "fake-toy"]) == 2
    assert "is blocked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plugin"], "No such command 'plugin'. Did you mean 'plugins'?"),
        (["zzzz"], "No such command 'zzzz'."),
        (["plugins", "--jsn"], "--jsn"),
        (["config", "check"], "RUN.toml"),
        (["config", "check", "nowhere.toml"], "no such run file"),
    ],
)
def test_mistakes_exit_with_2_and_no_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_errors_and_interrupts_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    import click

    def command(raises: BaseException) -> click.Command:
        def body() -> None:
            raise raises

        return click.Command("x", callback=body)

    assert execute(command(TargetError("no target", where="m")), "x", []) == 2
    assert capsys.readouterr().err == "Error: no target\n  where:    m\n"
    assert execute(command(KeyboardInterrupt()), "x", []) == 130
    assert execute(click.Command("x", callback=lambda: click.get_current_context().exit(3)), "x", []) == 3
    assert execute(click.Command("x", callback=lambda: None), "x", []) == 0
    with pytest.raises(ZeroDivisionError):
        execute(command(ZeroDivisionError()), "x", [])


def test_deepspec_run_is_the_run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import click

    seen: list[str] = []
    run = click.Command("run", params=[click.Argument(["path"])], callback=lambda path: seen.append(path))
    monkeypatch.setattr(command_line, "_core_commands", lambda: ["run"])
    monkeypatch.setattr(command_line, "_import_command", lambda name: run if name == "run" else None)
    assert run_main(["a.toml"]) == 0
    assert main(["run", "b.toml"]) == 0
    assert seen == ["a.toml", "b.toml"]
    monkeypatch.setattr(command_line, "_core_commands", list)
    assert run_main(["a.toml"]) == 2
    assert "no run command" in capsys.readouterr().err


def test_every_listed_command_has_a_file_and_imports() -> None:
    names = command_line._core_commands()
    assert {"config", "plugins"} <= set(names) <= set(command_line.COMMANDS)
    for name in names:
        assert command_line._import_command(name).help


COMMANDS = """
    import click

    @hookimpl
    def deepspec_commands(cli):
        @cli.command()
        def greet():
            "Say hello."
            click.echo("hello")

        @cli.command()
        def plugins():
            "Not core's."
"""


def test_plugins_add_commands_but_take_none(distributions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    distributions.add("fake-greeter", COMMANDS)
    distributions.add("fake-clumsy", "@hookimpl\ndef deepspec_commands(cli):\n    raise KeyError('oops')\n")
    assert main(["greet"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "hello\n"
    assert "'plugins' is already a command of deepspec-core" in captured.err
    assert "fake-clumsy" in captured.err
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "greet" in shown
    assert "Show or check a run file" in shown


UNRULY = """
    import click
    print("loading")

    @hookimpl
    def deepspec_commands(cli):
        print("adding")
        cli.commands["five"] = 5

        @cli.command()
        @click.option("--exit", "code", type=int)
        def fall(code):
            if code:
                raise SystemExit(code)
            raise ValueError("boom")
"""


def test_an_unruly_plugin_breaks_no_command(distributions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = distributions.add("fake-unruly", UNRULY)
    distributions.add("fake-ending", "@hookimpl\ndef deepspec_commands(cli):\n    raise SystemExit(7)\n")
    assert main(["--help"]) == 0
    seen = capsys.readouterr()
    assert "fake-unruly/fake-unruly: 'five' is a int, not a click.Command" in seen.err
    assert "fake-ending/fake-ending: SystemExit: 7" in seen.err
    assert "adding" in seen.err
    assert "adding" not in seen.out
    assert main(["fall"]) == 2
    told = capsys.readouterr().err
    assert "command 'fall' of plugin fake-unruly/fake-unruly failed" in told
    assert "ValueError: boom" in told
    assert f"{module}.py" in told
    assert main(["fall", "--exit", "9"]) == 9


def test_what_a_plugin_prints_is_no_part_of_the_list(distributions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    distributions.add("fake-unruly", UNRULY)
    assert main(["plugins", "--json"]) == 0
    seen = capsys.readouterr()
    assert "fake-unruly" in [one["package"] for one in json.loads(seen.out)]
    assert "loading" in seen.err


def test_core_commands_do_not_ask_plugins_for_theirs(distributions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    distributions.add("fake-clumsy", "@hookimpl\ndef deepspec_commands(cli):\n    raise KeyError('oops')\n")
    assert main(["config", "--help"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["plugins"], ["torch", "transformers", "numpy", "rich", "cattrs", "tomli"]),
        (["plugins", "--json"], ["torch", "transformers", "numpy", "rich", "cattrs", "tomli"]),
        (["config", "check", "run.toml"], ["torch", "transformers", "numpy", "rich"]),
        (["config", "show", "run.toml"], ["torch", "transformers", "numpy", "rich"]),
        (["--help"], ["torch", "transformers"]),
    ],
)
def test_nothing_heavy_is_imported(run_file: Path, toy: Any, arguments: list[str], heavy: list[str]) -> None:
    code = (
        "import sys; from deepspec_core.cli.main import main; code = main(sys.argv[1:]);"
        f"print('imported:', [name for name in {heavy} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=run_file.parent,
        env={**os.environ, "PYTHONPATH": str(toy.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: []"


def test_a_fault_that_nobody_can_catch_says_where_it_was() -> None:
    code = "import os, signal, deepspec_core.cli.main as m; m.main(['--version']); os.kill(os.getpid(), signal.SIGBUS)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGBUS
    assert "Bus error" in ended.stderr
