"""What the README promises: its commands are those of CI, its run files are real, packages are as told."""

import re
import tomllib
from pathlib import Path

import pytest

from deepspec_core.cli.main import main

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "targets", "dflash", "dspark", "eagle3")


def test_ci_runs_the_readmes_commands() -> None:
    commands = re.findall(r"^python3 -m venv.*$", (ROOT / "README.md").read_text(), flags=re.M)
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    install, test = (part.split("/bin/")[1] for part in commands[1].split(" && ")[1:])
    assert install in ci.replace('"', "").replace("$work/venv/bin/pip", "pip")
    assert test in ci.replace('"$bin/pytest"', "pytest").replace('"', "").replace("'", "") or test in ci.replace(
        '"$bin/pytest"', "pytest"
    )


def test_quickstart_drafters_can_be_compared() -> None:
    quickstart = ROOT / "examples" / "quickstart"
    files = {path.stem: tomllib.loads(path.read_text()) for path in quickstart.glob("*.toml")}
    assert files.keys() == {"train", "dflash", "dspark", "eagle3"}
    recommended = tomllib.loads((ROOT / "examples" / "recipes" / "recommended" / "dspark.toml").read_text())
    train = files.pop("train")
    assert {**train, "run": {}, "train": {}} == {**recommended, "run": {}, "train": {}}
    assert {**train["train"], "epochs": recommended["train"]["epochs"]} == recommended["train"]
    assert train["train"]["epochs"] < recommended["train"]["epochs"], "the quickstart is to be quick"
    for section in ("target", "data", "regenerate", "features", "cache", "train", "evaluate"):
        assert files["dflash"][section] == files["dspark"][section] == files["eagle3"][section], section
    assert len({run["draft"].get("block_size", run["draft"].get("ttt_length")) for run in files.values()}) == 1
    assert len({run["run"]["seed"] for run in files.values()}) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "quickstart").glob("*.toml")), ids=lambda path: path.name)
def test_quickstart_files_are_valid(path: Path) -> None:
    assert main(["config", "check", str(path)]) == 0


def test_packages_have_what_a_package_needs_and_one_version() -> None:
    versions = set()
    for name in PACKAGES:
        folder = ROOT / f"deepspec-{name}"
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        versions.add(project["version"])
        assert project["entry-points"]["deepspec"] == {name: f"deepspec_{name}.plugin"}
        assert (folder / "src" / f"deepspec_{name}" / "py.typed").exists()
        assert (folder / "src" / f"deepspec_{name}" / "plugin.py").exists()
        assert len((folder / "README.md").read_text().splitlines()) > 5
    assert len(versions) == 1


def test_core_names_no_algorithm_and_no_family() -> None:
    # llama.cpp is an engine, not a family.
    names = re.compile(r"\b(qwen\d*|gemma\d*|llama(?!\.cpp)|mistral|dspark|dflash|eagle3?)\b", re.I)
    for path in (ROOT / "deepspec-core" / "src").rglob("*.py"):
        found = names.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)} names {found.group() if found else ''}"


def test_files_hold_one_idea() -> None:
    for path in ROOT.glob("deepspec-*/src/**/*.py"):
        assert path.stem not in ("utils", "util", "common", "helpers", "helper", "misc"), path
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        if lines:
            assert lines[0].startswith('"""'), f"{path.relative_to(ROOT)} has no docstring"
