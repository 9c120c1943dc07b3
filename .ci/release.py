#!/usr/bin/env python3
"""Builds the wheels and sdists of a release, and refuses what should not be published.

    .ci/release.py --out dist                what CHANGELOG.md calls released
    .ci/release.py --out dist --candidate    also a version that it calls "not released yet"

Before building: versions agree everywhere, the changelog has the version, LICENSE and NOTICE are the same in each
package. After it: each archive says the version, holds both files and every file of its package that git knows, and no
other. It needs git and network access, for a fresh environment with hatchling. Nothing is uploaded.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("core", "targets", "dflash", "dspark", "eagle3", "export", "tasks")
LEGAL = ("LICENSE", "NOTICE")
_HATCHLING = "hatchling==1.28.0"
# Archives have these beside what git knows.
_OF_A_WHEEL = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", *(f"licenses/{name}" for name in LEGAL))
_OF_AN_SDIST = ("PKG-INFO", ".gitignore")


def source_problems(root: Path, *, candidate: bool = False) -> list[str]:
    """What is wrong before anything is built, in words; empty where all is well."""
    found = []
    projects = {name: _project(root / name) for name in _folders()}
    versions = {name: str(project["version"]) for name, project in projects.items()}
    if len(set(versions.values())) > 1:
        found.append(f"versions differ: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    version = versions["deepspec-core"]
    text = (root / "deepspec-core" / "src" / "deepspec_core" / "__init__.py").read_text(encoding="utf-8")
    said = re.search(r'^__version__ = "(.+)"$', text, re.M)
    if said is None or said[1] != version:
        found.append(f"deepspec_core.__version__ is {said and said[1]}, and pyproject.toml says {version}")
    for name, project in projects.items():
        own = [one for one in project["dependencies"] if one.partition("==")[0] in projects]
        found += [f"{name} asks for {one}, and not for =={version}" for one in own if not one.endswith(f"=={version}")]
        unpinned = [one for one in project["dependencies"] if one.startswith("deepspec-") and one not in own]
        found += [f"{name} asks for {one}, of no one version" for one in unpinned]
        for file in LEGAL:
            copy = root / name / file
            if not copy.is_file() or copy.read_bytes() != (root / file).read_bytes():
                found.append(f"{name}/{file} is not the repository's {file}")
        if sorted(project.get("license-files", [])) != sorted(LEGAL):
            found.append(f"{name}: license-files are not {', '.join(LEGAL)}")
    return [*found, *_changelog_problems(root / "CHANGELOG.md", version, candidate=candidate)]


def _changelog_problems(path: Path, version: str, *, candidate: bool) -> list[str]:
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.M)
    if not headings or re.match(rf"{re.escape(version)}\b(?![.\w])", headings[0]) is None:
        return [f"{path.name} begins with {headings[0] if headings else 'nothing'}, and not with {version}"]
    if "not released" in headings[0] and not candidate:
        return [f"{path.name} says {headings[0]!r}: give the day"]
    section = text.partition(f"## {headings[0]}")[2].partition("\n## ")[0]
    return [] if re.search(r"^- ", section, re.M) else [f"{path.name} says nothing of {version}"]


def archive_problems(archive: Path, package: Path, tracked: set[str], version: str) -> list[str]:
    """What is wrong with a wheel or an sdist of the folder `package`, of which git knows `tracked`, relative to it."""
    files = _files(archive)
    wheel, name = archive.suffix == ".whl", package.name.replace("-", "_")
    info = f"{name}-{version}.dist-info" if wheel else f"{name}-{version}"
    about = f"{info}/METADATA" if wheel else f"{info}/PKG-INFO"
    if wheel:
        wanted = {path.removeprefix("src/"): path for path in tracked if path.startswith("src/")}
        more = {f"{info}/{one}" for one in _OF_A_WHEEL}
        legal = {f"{info}/licenses/{file}": file for file in LEGAL}
    else:
        wanted = {f"{info}/{path}": path for path in tracked}
        more = {f"{info}/{one}" for one in _OF_AN_SDIST}
        legal = {f"{info}/{file}": file for file in LEGAL}
    found = [f"{path} is missing" for path in sorted(wanted.keys() - files.keys())]
    found += [f"{path} is no file of the package" for path in sorted(files.keys() - wanted.keys() - more)]
    found += [
        f"{path} is not {source}"
        for path, source in sorted({**wanted, **legal}.items())
        if path in files and files[path] != (package / source).read_bytes()
    ]
    found += [f"{path} is missing" for path in sorted(legal.keys() - files.keys() - wanted.keys())]
    said = HeaderParser().parsestr(files.get(about, b"").decode("utf-8"))["Version"]
    if said != version:
        found.append(f"{about} says version {said}")
    return [f"{archive.name}: {one}" for one in dict.fromkeys(found)]


def _files(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as zipped:
            return {name: zipped.read(name) for name in zipped.namelist() if not name.endswith("/")}
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not member.isdir():
                opened = tar.extractfile(member)  # None for what is no plain file
                found[member.name] = b"" if opened is None else opened.read()
    return found


def build(root: Path, out: Path) -> list[Path]:
    """Wheels and sdists of all packages, in `out`."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", _HATCHLING], check=True)
        for name in _folders():
            command: list[str | Path] = [python, "-m", "hatchling", "build", "-d", out.resolve()]
            subprocess.run(command, cwd=root / name, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return sorted(out.iterdir())


def tracked_files(package: Path) -> set[str]:
    """What git knows of a folder, relative to it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=package, check=True, capture_output=True, text=True)
    return set(filter(None, listed.stdout.split("\0")))


def _folders() -> list[str]:
    return [f"deepspec-{name}" for name in PACKAGES]


def _project(package: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def main() -> int:
    """Build and check; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there, or empty")
    parser.add_argument("--candidate", action="store_true", help='also a version that is "not released yet"')
    asked = parser.parse_args()
    if asked.out.exists() and any(asked.out.iterdir()):
        parser.error(f"{asked.out} holds something already")
    problems = source_problems(ROOT, candidate=asked.candidate)
    if not problems:
        asked.out.mkdir(parents=True, exist_ok=True)
        archives = build(ROOT, asked.out)
        version = str(_project(ROOT / "deepspec-core")["version"])
        for name in _folders():
            of = [path for path in archives if path.name.startswith(f"{name.replace('-', '_')}-{version}")]
            if sorted(path.suffix for path in of) != [".gz", ".whl"]:
                problems.append(f"{name}: {', '.join(path.name for path in of) or 'nothing'} was built")
            tracked = tracked_files(ROOT / name)
            problems += [one for path in of for one in archive_problems(path, ROOT / name, tracked, version)]
    for one in problems:
        print(one, file=sys.stderr)
    if not problems:
        print(f"{len(archives)} archives in {asked.out}, nothing is wrong with them")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
