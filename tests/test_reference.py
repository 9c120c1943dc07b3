"""Hooks and contracts: each has an entry in docs/contracts.md that says what the code says, and each hook is called.

A run with one plugin of every hook says which were called, with what. The plugin's builtin and feature source are used.
"""

import importlib
import inspect
import json
import re
import sys
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from plugin_on_path import install

import deepspec_core
from deepspec_core import testing as kit
from deepspec_core.cli.main import main
from deepspec_core.plugins import hooks
from deepspec_core.plugins.public import PUBLIC_MODULES, first_sentence
from deepspec_core.plugins.registry import KINDS

REFERENCE = (Path(__file__).parents[1] / "docs" / "contracts.md").read_text(encoding="utf-8")
HOOKS = sorted(name for name in vars(hooks) if name.startswith("deepspec_"))
# Methods of contracts that Python calls.
SPECIAL = ("__call__", "__getitem__", "__len__")
OFFERING = {kind.hook for kind in KINDS.values()}


def section(hook: str) -> str:
    """What stands under the hook's heading."""
    found = re.findall(rf"^### `{hook}`\n\n(.*?)(?=^##|\Z)", REFERENCE, re.M | re.S)
    assert len(found) == 1, f"docs/contracts.md has {len(found)} entries of {hook}"
    return str(found[0])


def table(text: str) -> dict[str, str]:
    """The rows of a table of two columns."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+) \|$", text, re.M))


def arguments(hook: str) -> list[str]:
    return list(inspect.signature(getattr(hooks, hook)).parameters)


@pytest.mark.parametrize("hook", sorted(set(HOOKS) - OFFERING))
def test_every_other_hook_has_an_entry_with_its_arguments(hook: str) -> None:
    """Its call, and what it is for, in words beyond the call."""
    call = f"`{hook}({', '.join(arguments(hook))})`"
    first, _, rest = section(hook).partition(call)
    assert first == "", f"the entry of {hook} does not begin with {call}"
    assert len(re.sub(r"`[^`]*`", "", rest).split()) >= 8, f"the entry of {hook} says nothing"
    assert inspect.getdoc(getattr(hooks, hook))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_an_entry_with_spec_contract_and_suite(kind: str) -> None:
    hook = KINDS[kind].hook
    rows = table(section(hook))
    assert rows["spec"].startswith(f"`{KINDS[kind].spec.__name__}`")
    assert {"in a run file", "chosen by"} & set(rows), f"the entry of {hook} does not say how a run names one"
    (built,) = [name for name in rows if name.startswith("`build") or name == "a draft that is trained"]
    if built.startswith("`build("):
        assert "contracts." in rows[built] or kind == "task", f"the entry of {hook} names no contract"
    for module, name in re.findall(r"`(contracts\.\w+)\.(\w+)`", section(hook)):
        assert hasattr(importlib.import_module(f"deepspec_core.{module}"), name), f"{module}.{name}"
    suites = {name for name in kit.__all__ if getattr(getattr(kit, name), "kind", None) == kind}
    assert set(re.findall(r"`(\w+Suite)`", rows["suite"])) == suites
    assert suites or rows["suite"].startswith("none"), f"the entry of {hook} does not say that there is no suite"
    assert inspect.getdoc(getattr(hooks, hook))


def contracts() -> Iterator[str]:
    """The rows of the table of contracts: each class that somebody implements, and the members it must have."""
    for module in PUBLIC_MODULES:
        loaded = importlib.import_module(module)
        for name in loaded.__all__ if module.startswith("deepspec_core.contracts.") else ():
            one = getattr(loaded, name)
            if inspect.isclass(one) and {Protocol, ABC} & set(one.__bases__):
                own = [*inspect.get_annotations(one), *vars(one)]
                members = [member for member in own if member in SPECIAL or not member.startswith("_")]
                about = first_sentence(inspect.getdoc(one) or "")
                assert about, f"{name} has no docstring"
                place = module.removeprefix("deepspec_core.")
                yield f"| `{place}.{name}` | {about} | {', '.join(f'`{member}`' for member in members)} |"


def test_every_contract_is_in_the_reference_with_its_members() -> None:
    found = re.findall(r"^\| `contracts\..*\|$", REFERENCE.partition("## Contracts")[2], re.M)
    assert found == list(contracts()), "the table has to be:\n" + "\n".join(contracts())
    modules = {path.stem for path in (Path(deepspec_core.__file__).parent / "contracts").glob("[a-z]*.py")}
    assert modules == {one.split(".")[2] for one in PUBLIC_MODULES if one.startswith("deepspec_core.contracts.")}


# A plugin with every hook, written from the hooks themselves. Its prompts and its feature source are core's.
PROBE = """
import click
from deepspec_core.plugins import BuiltinSpec, ComponentSpec, hookimpl

CALLS = {{}}

{hooks}

def prompts(split, seed):
    CALLS["prompts"] = (split, seed)
    question = "What is 2 + 3?" if split == "train" else "How much is 2 + 3?"
    turns = [{{"role": "user", "content": question}}, {{"role": "assistant", "content": "2 + 3 = 5, friend."}}]
    return [{{"id": str(number), "messages": turns}} for number in range(8)]

def features(run):
    CALLS["features"] = run
    return run.plugins.registry.load("features", "online")(run)
"""
GIVEN = {
    "deepspec_builtins": '[BuiltinSpec(name="probed", summary="", kind="prompts", build="probe_of_hooks:prompts")]',
    "deepspec_feature_sources": '[ComponentSpec(name="probed", summary="", build="probe_of_hooks:features")]',
    "deepspec_commands": 'cli.add_command(click.Command("probed", callback=lambda: print("probed it")))',
}
RUN = """
[run]
name = "probed"
output = "run"
stages = ["train", "evaluate"]
threads = 1

[target]
model = "builtin:tiny-qwen3"
layers = [2, 6]

[data]
sources = [{path = "builtin:probed"}]
min_supervised_tokens = 2
max_length = 64

[features]
mode = "probed"

[draft]
type = "dflash"
block_size = 4
num_layers = 1
num_anchors = 4

[train]
global_batch_size = 2
max_steps = 1
precision = "float32"

[evaluate]
tasks = ["held-out"]
temperature = [0.0]
max_new_tokens = 2
limit = 1
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Hook -> the arguments of its last call, after a run of one step and an evaluation of one prompt."""
    folder = tmp_path_factory.mktemp("probed")
    written = [
        f"@hookimpl\ndef {hook}({', '.join(arguments(hook))}):\n"
        f"    CALLS[{hook!r}] = ({''.join(f'{name}, ' for name in arguments(hook))})\n"
        f"    return {GIVEN.get(hook, '[]')}\n"
        for hook in HOOKS
    ]
    with pytest.MonkeyPatch.context() as patch:
        install(folder / "site", patch, "probe-of-hooks", PROBE.format(hooks="\n".join(written)))
        (folder / "train.toml").write_text(RUN)
        assert main(["run", str(folder / "train.toml")]) == 0
        assert main(["probed"]) == 0
        yield sys.modules["probe_of_hooks"].CALLS
        del sys.modules["probe_of_hooks"]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_called_in_a_run(hook: str, calls: dict[str, Any]) -> None:
    assert hook in calls, f"nothing in a run calls {hook}"
    assert len(calls[hook]) == len(arguments(hook))
    assert None not in calls[hook]


def test_notices_are_given_what_the_reference_says(calls: dict[str, Any]) -> None:
    run, checkpoint = calls["deepspec_checkpoint_saved"]
    assert checkpoint.is_relative_to(run.folder)
    assert (checkpoint / "draft" / "config.json").exists()
    same, report = calls["deepspec_evaluation_finished"]
    assert json.loads((run.folder / "metrics.json").read_text()) == json.loads(json.dumps(report))
    assert same.folder == run.folder


def test_what_has_no_suite_is_used_in_a_run(calls: dict[str, Any]) -> None:
    """The builtin gave the run its rows, and the feature source its features."""
    assert calls["prompts"]
    assert calls["features"].file.features.mode == "probed"
