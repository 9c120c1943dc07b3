"""The documentation holds together: links lead somewhere, commands exist, files and snippets shown are valid."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from deepspec_core.cli.main import cli, main

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deepspec-*/*.md", "examples/**/*.md", "tests/benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README_LINES = 50


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _blocks(name: str, *languages: str) -> list[str]:
    return [body for language, body in CODE.findall(_text(name)) if language in languages]


def _anchors(page: str) -> set[str]:
    """As code hosts and mkdocs name headings: lower case, spaces to dashes, punctuation dropped."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_there_are_pages() -> None:
    assert {"README.md", "docs/index.md", "docs/run-file.md", "CONTRIBUTING.md", "deepspec-core/README.md"} <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(CODE.sub("", _text(name))):
        if link.startswith(("https://", "http://")):
            continue
        place, _, anchor = link.partition("#")
        goal = (page.parent / place).resolve() if place else page
        assert goal.exists(), f"{link} leads nowhere"
        assert goal.is_relative_to(ROOT), f"{link} leads out of the repository"
        if anchor:
            assert anchor in _anchors(goal.read_text(encoding="utf-8")), f"{link}: no such heading"


def _commands(name: str) -> Iterator[list[str]]:
    """Every `deepspec ...` that a page shows, in blocks and in running text."""
    text = _text(name)
    shown = [line for block in _blocks(name, "sh") for line in block.replace("\\\n", " ").splitlines()]
    shown += re.findall(r"`(deepspec [^`]+)`", CODE.sub("", text))
    for line in shown:
        if not re.search(r"(?<![\w.-])deepspec(-run)?\s", line):
            continue
        for part in re.split(r"&&|;", line.split(" # ")[0]):
            words = shlex.split(part.split(" > ")[0], comments=True)
            while words and not re.fullmatch(r"(\S*/)?deepspec(-run)?", words[0]):
                words = words[1:]
            if len(words) > 1 and not words[1].isupper():
                yield ["run", *words[1:]] if words[0].endswith("-run") else words[1:]


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_exist(name: str) -> None:
    for words in _commands(name):
        command: click.Command | None = cli
        context = click.Context(cli)
        rest = words[: words.index("--")] if "--" in words else list(words)  # behind it stand another program's
        while isinstance(command, click.Group) and rest and re.fullmatch(r"[a-z]+", rest[0]):
            command = command.get_command(context, rest.pop(0))
            assert command is not None, f"{name}: deepspec {' '.join(words)}"
        assert command is not None
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("-") and word not in ("-", "-h", "--help") and not re.match(r"-\d", word):
                assert word.split("=")[0] in known | {"--version"}, f"{name}: deepspec {' '.join(words)}: {word}"


@pytest.mark.parametrize("name", NAMES)
def test_toml_and_python_shown_can_be_read(name: str, tmp_path: Path) -> None:
    for block in _blocks(name, "toml"):
        tables = tomllib.loads(block)
        if {"run", "target", "data", "draft"} <= tables.keys():
            path = tmp_path / "shown.toml"
            path.write_text(block)
            assert main(["config", "check", str(path)]) == 0
    for block in _blocks(name, "python"):
        ast.parse(block)


def test_pictures_are_current_and_say_something(tmp_path: Path) -> None:
    for picture, words in {"batch.svg": "Row engine", "round.svg": "accepted length"}.items():
        tree = ElementTree.parse(ROOT / "docs" / picture)
        assert words in "".join(tree.getroot().itertext())
    (tmp_path / "pictures.py").write_text((ROOT / "docs" / "pictures.py").read_text())
    subprocess.run([sys.executable, str(tmp_path / "pictures.py")], check=True)
    for picture in ("batch.svg", "round.svg"):
        assert (tmp_path / picture).read_text() == (ROOT / "docs" / picture).read_text(), "python docs/pictures.py"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == there


def test_package_readmes_are_one_screen() -> None:
    lengths = {path.parent.name: len(path.read_text().splitlines()) for path in ROOT.glob("deepspec-*/README.md")}
    assert len(lengths) == 7
    assert {name: length for name, length in lengths.items() if length > README_LINES} == {}


def test_packages_say_who_they_are() -> None:
    for path in sorted(ROOT.glob("deepspec-*/pyproject.toml")):
        project = tomllib.loads(path.read_text())["project"]
        for key in ("description", "readme", "license", "license-files", "authors", "keywords", "classifiers", "urls"):
            assert project.get(key), f"{path.parent.name}: {key}"
        assert "Typing :: Typed" in project["classifiers"]
        for file in ("LICENSE", "NOTICE"):
            assert (path.parent / file).read_text() == (ROOT / file).read_text()


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = re.findall(r"entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), re.MULTILINE)
    assert len(hooks) == 3
    script = (ROOT / ".ci" / "run").read_text()
    assert '"$bin/ruff" check .' in script
    assert '"$bin/ruff" format --check .' in script
    assert hooks[:2] == ["ruff check .", "ruff format --check ."]
    packages = re.search(r"for package in ([\w ]+); do", script)
    assert packages is not None
    assert f"for package in {packages[1]}; do mypy" in hooks[2]
