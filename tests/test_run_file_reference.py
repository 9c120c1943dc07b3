"""`deepspec config keys` and the page it writes: every key has a type, a default and a meaning; the page is current."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import fields, frozen, has

from deepspec_core.cli.main import main
from deepspec_core.config.explain import keys_of
from deepspec_core.config.load import RunFile
from deepspec_core.config.reference import KeyFacts, meanings, sections, sections_named
from deepspec_core.plugins.discovery import load_plugins

PAGE = Path(__file__).parents[1] / "docs" / "run-file.md"
# What this repository offers, whatever else is installed.
OURS = ("dflash", "dspark", "eagle3", "decay", "d-pace")


def _ours() -> Iterator[Any]:
    for section in sections(load_plugins().registry):
        if "(type " not in section.path or any(f'"{name}"' in section.path for name in OURS):
            yield section


def test_every_key_has_a_meaning() -> None:
    for section in _ours():
        assert section.about, section.path
        for key in section.keys:
            assert key.meaning.endswith("."), f"{section.path}.{key.name}: {key.meaning!r}"


def test_every_key_of_the_schema_is_there() -> None:
    listed = {(section.path, key.name) for section in _ours() for key in section.keys}
    for attribute in fields(RunFile):
        if has(attribute.type or object):
            for key in keys_of(attribute.type):
                assert (attribute.name, key) in listed
    assert ("top-level", "required_plugins") in listed
    assert ("draft.layer", "num_heads") in listed
    assert ('draft (type "dspark").markov', "rank") in listed


def test_facts_are_the_schema_s(capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluation = sections_named("train", load_plugins().registry)
    assert (evaluation.path, evaluation.keys[0].name) == ("train.evaluation", "prompts")
    by_name = {key.name: key for key in train.keys}
    assert by_name["lr"] == KeyFacts(
        name="lr", type="a number", default="0.0006", limits="> 0", meaning="The peak learning rate."
    )
    assert (by_name["max_steps"].default, by_name["betas"].default) == ("", "[0.9, 0.999]")
    assert by_name["precision"].limits == "one of float32, bfloat16"
    assert main(["config", "keys", "draft", "--json"]) == 0
    found = {one["path"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["draft"]["keys"][0]["default"] is None
    assert {key["name"] for key in found['draft (type "dspark")']["keys"]} >= {"block_size", "markov"}


def test_a_section_that_does_not_exist_has_a_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "trian"]) == 2
    assert "write 'train'" in capsys.readouterr().err


def test_the_terminal_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "features"]) == 0
    output = capsys.readouterr().out
    assert "[features]" in output
    assert 'mode: text in quotes; default "online"' in output


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "--markdown"]) == 0
    assert PAGE.read_text(encoding="utf-8") == capsys.readouterr().out, "run: deepspec config keys --markdown"


def test_options_of_a_third_party_are_read_with_or_without_meanings() -> None:
    @frozen(kw_only=True)
    class Options:
        """A draft of somebody's.

        width: How wide it is, in
            hidden sizes.
        note: this is no key.
        """

        width: int = 2
        depth: int = 3

    assert meanings(Options) == {"width": "How wide it is, in hidden sizes."}


def test_nothing_heavy_is_imported() -> None:
    code = "import sys; from deepspec_core.cli.main import main; main(['config', 'keys']); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
