"""What .ci/release.py refuses: sources that do not agree, and archives that are not their package."""

from __future__ import annotations

import importlib.util
import io
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
VERSION = "1.2"


@pytest.fixture(scope="module")
def release() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["release"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sources(release: Any, tmp_path: Path) -> Path:
    """A copy of what is looked at before anything is built."""
    for name in ("CHANGELOG.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (f"deepspec-{one}" for one in release.PACKAGES):
        (tmp_path / name).mkdir()
        for file in ("pyproject.toml", "LICENSE", "NOTICE"):
            shutil.copy(ROOT / name / file, tmp_path / name / file)
    code = Path("deepspec-core", "src", "deepspec_core", "__init__.py")
    (tmp_path / code).parent.mkdir(parents=True)
    shutil.copy(ROOT / code, tmp_path / code)
    return tmp_path


def test_this_repository_could_be_a_candidate(release: Any, sources: Path) -> None:
    assert release.source_problems(sources, candidate=True) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("deepspec-dspark/pyproject.toml", 'version = "', 'version = "9', "versions differ"),
        ("deepspec-dspark/pyproject.toml", '"deepspec-dflash==', '"deepspec-dflash==9', "deepspec-dspark asks for"),
        ("deepspec-dspark/pyproject.toml", '"deepspec-dflash==', '"deepspec-dflash>=', "of no one version"),
        ("deepspec-core/src/deepspec_core/__init__.py", '__version__ = "', '__version__ = "9', "__version__ is 9"),
        ("deepspec-tasks/NOTICE", "DeepSpec", "DeepSpecs", "deepspec-tasks/NOTICE is not the repository's"),
        ("deepspec-tasks/pyproject.toml", ', "NOTICE"', "", "license-files"),
        ("CHANGELOG.md", "\n## 0", "\n## 9.0\n\n- New.\n\n## 0", "begins with 9.0"),
        ("CHANGELOG.md", "\n- ", "\n* ", "says nothing of"),
    ],
)
def test_sources_that_do_not_agree(release: Any, sources: Path, file: str, old: str, new: str, says: str) -> None:
    path = sources / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    problems = release.source_problems(sources, candidate=True)
    assert any(says in one for one in problems), problems


def test_a_version_without_its_day_is_no_release(release: Any, sources: Path) -> None:
    path = sources / "CHANGELOG.md"
    lines = path.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("## "))
    version = lines[at].removeprefix("## ").split(",")[0]
    path.write_text("\n".join([*lines[:at], f"## {version}, not released yet", *lines[at + 1 :]]))
    assert any("not released yet" in one for one in release.source_problems(sources))
    path.write_text("\n".join([*lines[:at], f"## {version}, 2026-12-01", *lines[at + 1 :]]))
    assert release.source_problems(sources) == []


@pytest.fixture
def package(tmp_path: Path) -> tuple[Path, set[str]]:
    """A package's folder, and what git knows of it."""
    folder = tmp_path / "deepspec-thing"
    files = {
        "LICENSE": "mine", "NOTICE": "thanks", "README.md": "# It", "pyproject.toml": "[project]",
        "src/deepspec_thing/__init__.py": "", "src/deepspec_thing/page.html": "<p>", "tests/test_it.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder, set(files)


@pytest.fixture(params=["wheel", "sdist"])
def archived(request: pytest.FixtureRequest, package: tuple[Path, set[str]], tmp_path: Path) -> Callable[..., Path]:
    """archived(change): an archive of the package, as hatchling makes it but for the change to its files."""

    def make(change: Callable[[dict[str, str]], Any] = lambda files: None) -> Path:
        folder, tracked = package
        if request.param == "wheel":
            info = f"deepspec_thing-{VERSION}.dist-info"
            files = {name[4:]: (folder / name).read_text() for name in tracked if name.startswith("src/")}
            files |= {f"{info}/licenses/{name}": (folder / name).read_text() for name in ("LICENSE", "NOTICE")}
            files |= {f"{info}/METADATA": f"Metadata-Version: 2.4\nVersion: {VERSION}\n\n# It", f"{info}/RECORD": ""}
            path = tmp_path / f"deepspec_thing-{VERSION}-py3-none-any.whl"
            change(files)
            with zipfile.ZipFile(path, "w") as zipped:
                for name, text in files.items():
                    zipped.writestr(name, text)
            return path
        info = f"deepspec_thing-{VERSION}"
        files = {f"{info}/{name}": (folder / name).read_text() for name in tracked}
        files |= {f"{info}/PKG-INFO": f"Metadata-Version: 2.4\nVersion: {VERSION}\n", f"{info}/.gitignore": "dist/"}
        change(files)
        path = tmp_path / f"{info}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
        return path

    return make


def _of(files: dict[str, str], end: str) -> str:
    (name,) = (one for one in files if one.endswith(end) and "tests" not in one)
    return name


def test_a_whole_archive_has_nothing_wrong(
    release: Any, package: tuple[Path, set[str]], archived: Callable[..., Path]
) -> None:
    assert release.archive_problems(archived(), *package, VERSION) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files.update({f"{_of(files, '/__init__.py')}.orig": "x"}), "is no file of the package"),
        (lambda files: files.pop(_of(files, "page.html")), "page.html is missing"),
        (lambda files: files.pop(_of(files, "NOTICE")), "NOTICE is missing"),
        (lambda files: files.update({_of(files, "LICENSE"): "theirs"}), "is not LICENSE"),
        (lambda files: files.update({_of(files, "page.html"): "<b>"}), "is not src/deepspec_thing/page.html"),
        (
            lambda files: files.update(
                {_of(files, "-INFO" if any("PKG" in one for one in files) else "METADATA"): "Version: 9\n"}
            ),
            "says version 9",
        ),
    ],
    ids=["stray", "missing", "no NOTICE", "another LICENSE", "changed", "another version"],
)
def test_what_is_wrong_with_an_archive_is_named(
    release: Any, package: tuple[Path, set[str]], archived: Callable[..., Path], change: Any, says: str
) -> None:
    problems = release.archive_problems(archived(change), *package, VERSION)
    assert any(says in one for one in problems), problems
