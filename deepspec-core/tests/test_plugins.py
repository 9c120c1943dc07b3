"""Finding, checking and registering plugins: one that fails is listed with its reason and never stops the others."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.version import Version

from deepspec_core import __version__
from deepspec_core.errors import PluginError
from deepspec_core.plugins import hooks as hookspecs
from deepspec_core.plugins.contract_changes import CHANGES
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.plugins.records import PluginRecord
from deepspec_core.plugins.registry import KINDS
from deepspec_core.plugins.requirements import check_required

LOSS = """
    @hookimpl
    def deepspec_losses():
        return [ComponentSpec(name="{name}", summary="a loss", build="nowhere:Loss")]
"""


LOST = """
    from attrs import frozen

    @frozen
    class Inner:
        depth: Absent = 0

    @frozen
    class Options:
        size: {type} = ()

    @hookimpl
    def deepspec_losses():
        return [ComponentSpec(name="a", summary="", build="a:b", options=Options)]
"""


def record(plugins: Plugins, package: str) -> PluginRecord:
    (found,) = [record for record in plugins.records if record.package == package]
    return found


def others_work(plugins: Plugins) -> bool:
    return record(plugins, "deepspec-core").status == "ok" and "ce" in plugins.registry.names("loss")


def test_core_offers_its_own_components_like_any_plugin() -> None:
    core = record(load_plugins(), "deepspec-core")
    assert (core.name, core.version, core.status, core.reason) == ("core", __version__, "ok", None)
    assert core.offers == {
        "loss": ["ce", "soft_ce", "kl", "tv", "lk", "confidence"],
        "weighting": ["uniform", "decay", "d-pace"],
        "cache": ["hdf5", "deepspec-v2"],
        "features": ["cached", "online", "server"],
    }


def test_a_plugin_that_raises_on_import_is_broken_with_type_message_and_line(distributions: Any) -> None:
    module = distributions.add("fake-broken", "import json\nraise RuntimeError('no luck\\ntoday')\n")
    plugins = load_plugins()
    broken = record(plugins, "fake-broken")
    assert broken.status == "broken"
    assert broken.reason == f"RuntimeError: no luck today ({distributions.folder / module}.py:5)"
    assert broken.offers == {}
    assert others_work(plugins)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def broken(:\n    pass\n", "SyntaxError: invalid syntax"),
        ("import a_module_nobody_has\n", "ModuleNotFoundError: No module named 'a_module_nobody_has'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("@hookimpl\ndef deepspec_loses():\n    return []\n", "unknown hook 'deepspec_loses': write 'deepspec_losses'"),
        ("@hookimpl\ndef deepspec_losses(config):\n    return []\n", "config"),
        ("def deepspec_losses():\n    return []\n", "deepspec_losses is not marked with @hookimpl"),
        ("@hookimpl\ndef deepspec_losses():\n    return 1 / 0\n", "deepspec_losses() failed: ZeroDivisionError"),
        ("@hookimpl\ndef deepspec_losses():\n    yield 1 / 0\n", "deepspec_losses() failed: ZeroDivisionError"),
        ("@hookimpl\ndef deepspec_losses():\n    pass\n", "deepspec_losses() failed: TypeError: 'NoneType'"),
        ("@hookimpl\ndef deepspec_losses():\n    return ['ce']\n", "offers a str, expected ComponentSpec"),
        (
            "@hookimpl\ndef deepspec_losses():\n    return [TaskSpec(name='a', summary='', build='a:b')]\n",
            "offers a TaskSpec, expected ComponentSpec",
        ),
        (
            "@hookimpl\ndef deepspec_losses():\n    return [ComponentSpec(name='a', summary='', build='')]\n",
            "'build' must match regex",
        ),
        (
            "@hookimpl\ndef deepspec_losses():\n"
            "    return [ComponentSpec(name='a', summary='', build='a:b', options=3)]\n",
            "'options' must be an attrs class",
        ),
        (
            "import attrs\n@attrs.frozen\nclass O:\n    type: str = ''\n@hookimpl\ndef deepspec_weightings():\n"
            "    return [ComponentSpec(name='a', summary='', build='a:b', options=O)]\n",
            "use a key that core keeps: 'type'",
        ),
        (
            "@hookimpl(wrapper=True)\ndef deepspec_losses():\n    return (yield)\n",
            "deepspec_losses cannot be a wrapper",
        ),
        ("@hookimpl\ndef deepspec_addhooks(manager):\n    raise OSError('full')\n", "OSError: full"),
        ("@hookimpl\ndef deepspec_addhooks(manager):\n    raise SystemExit(5)\n", "SystemExit: 5"),
        ("@hookimpl\ndef deepspec_losses():\n    raise SystemExit(4)\n", "deepspec_losses() failed: SystemExit: 4"),
        (LOSS.replace("a loss", "two\\nlines").format(name="a"), "'summary' must be text of one line: 'two\\nlines'"),
        (LOSS.replace("a loss", "\\x1b[31mred").format(name="a"), "'summary' must be text of one line"),
        (LOST.format(type="Missing"), "the types of the options of 'a' cannot be resolved: NameError: name 'Missing'"),
        (LOST.format(type="tuple[Inner, ...]"), "cannot be resolved: NameError: name 'Absent'"),
    ],
)
def test_every_way_of_being_broken_is_told_and_stops_nobody(distributions: Any, source: str, reason: str) -> None:
    distributions.add("fake-broken", source)
    distributions.add("fake-good", LOSS.format(name="good"))
    plugins = load_plugins()
    broken = record(plugins, "fake-broken")
    assert broken.status == "broken"
    assert reason in str(broken.reason)
    assert "\n" not in str(broken.reason)
    assert others_work(plugins)
    assert plugins.registry.provider("loss", "good") == "fake-good"
    assert "fake-broken" not in plugins.versions()


@pytest.mark.parametrize(
    ("requirement", "status"),
    [
        ("deepspec-core>=99", "incompatible"),
        ("DeepSpec_Core < 0.0.1", "incompatible"),
        (f"deepspec-core=={__version__}", "ok"),
        ("deepspec-core>=99; python_version < '3'", "ok"),
        ("deepspec-core", "ok"),
        ("deepspec-corelike>=99", "ok"),
    ],
)
def test_a_plugin_made_for_another_core_is_not_imported(distributions: Any, requirement: str, status: str) -> None:
    module = distributions.add("fake-old", LOSS.format(name="old"), requires=["attrs", requirement])
    plugins = load_plugins()
    old = record(plugins, "fake-old")
    assert old.status == status
    assert (module in sys.modules) == (status == "ok")
    if status == "incompatible":
        assert old.reason is not None
        assert f"installed is {__version__}" in old.reason
        with pytest.raises(PluginError, match="is incompatible"):
            plugins.registry.get("loss", "old")


@pytest.mark.parametrize(
    ("requirement", "told"),
    [
        (">=0.1,<0.2", True),
        ("<0.2", True),
        ("~=0.1.3", True),
        (">=0.1.1,<0.2", True),
        ("==0.1.5", True),
        ("==0.1.*", True),
        (">0.1.2,<0.2", True),
        (">=0.1.0a1,<0.2.0a0", True),
        (">=99,<100", False),
        ("==0.2.7", False),
    ],
)
def test_a_plugin_for_earlier_contracts_is_told_what_changed(distributions: Any, requirement: str, told: bool) -> None:
    distributions.add("fake-early", LOSS.format(name="early"), requires=[f"deepspec-core{requirement}"])
    reason = str(record(load_plugins(), "fake-early").reason)
    assert ("since then: readers of caches have tokens_of(index); FamilyAdapter" in reason) == told


def test_the_changelog_has_every_change_of_the_contracts() -> None:
    told = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    section = told.split("### Contracts, second edition")[1].split("###")[0].lower()
    names = ("tokens_of", "deepspec_core.families", "head_norms", "last_hidden", "sees", "deepspec_core.preparation")
    for change, name in zip(CHANGES["0.2"], (*names, "max_nodes", "trained_drafts", "importers", "soft"), strict=True):
        assert name in change
        assert name in section
    assert max(CHANGES, key=Version) == ".".join(__version__.split(".")[:2]), "say what changed, or that nothing did"


@pytest.mark.parametrize("name", ["fake-nice", "nice", "Fake_Nice"])
def test_plugins_are_blocked_by_name_or_distribution_and_not_imported(distributions: Any, name: str) -> None:
    module = distributions.add("fake-nice", LOSS.format(name="nice"), plugin="nice")
    plugins = load_plugins(blocked=[name])
    assert record(plugins, "fake-nice").status == "blocked"
    assert module not in sys.modules
    with pytest.raises(PluginError, match="is blocked: --no-plugin"):
        plugins.registry.get("loss", "nice")
    assert others_work(plugins)


def test_blocking_a_plugin_that_is_not_there_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(PluginError) as caught:
        load_plugins(blocked=["deepspec-cor"])
    assert caught.value.fix == "write 'deepspec-core'"


def test_two_plugins_with_one_name_fail_only_where_the_name_is_needed(distributions: Any) -> None:
    distributions.add(
        "fake-one", LOSS.format(name="same") + LOSS.replace("losses", "cache_formats").format(name="mine")
    )
    distributions.add("fake-two", LOSS.format(name="same"), version="2.0")
    plugins = load_plugins()
    one, two = record(plugins, "fake-one"), record(plugins, "fake-two")
    assert (one.status, two.status) == ("duplicate", "duplicate")
    assert one.reason == "loss term 'same' is also offered by fake-two 2.0"
    assert two.reason == "loss term 'same' is also offered by fake-one 1.0"
    assert plugins.registry.provider("cache", "mine") == "fake-one"
    with pytest.raises(PluginError) as caught:
        plugins.registry.get("loss", "same")
    assert caught.value.found == "fake-one 1.0 and fake-two 2.0"
    assert load_plugins(blocked=["fake-two"]).registry.provider("loss", "same") == "fake-one"


def test_two_plugins_of_one_name_and_two_names_of_one_module(distributions: Any) -> None:
    distributions.add("fake-one", LOSS.format(name="first"), plugin="twin")
    distributions.add("fake-two", LOSS.format(name="second"), plugin="twin")
    info = distributions.folder / "fake_two-1.0.dist-info"
    (info / "entry_points.txt").write_text("[deepspec]\ntwin = fake_two_plugin\nzweiter = fake_two_plugin\n")
    plugins = load_plugins()
    assert record(plugins, "fake-one").status == "ok"
    again = [entry for entry in plugins.records if entry.package == "fake-two"]
    assert [(entry.name, entry.status) for entry in again] == [("twin", "ok"), ("zweiter", "broken")]
    assert again[1].reason == "fake_two_plugin is already loaded as fake-two/twin"
    assert {"first", "second"} <= set(plugins.registry.names("loss"))


ADDS = """
    import pluggy
    hookspec = pluggy.HookspecMarker("deepspec")

    class Hooks:
        @hookspec
        def deepspec_greeted(self, name):
            "Somebody was greeted."

    @hookimpl
    def deepspec_addhooks(manager):
        manager.add_hookspecs(Hooks)
"""
GREETED = """
    @hookimpl
    def deepspec_greeted({argument}):
        return "{package}"
"""


def test_added_hooks_serve_plugins_loaded_before_and_after(distributions: Any) -> None:
    distributions.add("fake-a", GREETED.format(argument="name", package="a"))
    distributions.add("fake-m", ADDS)
    distributions.add("fake-z", GREETED.format(argument="name", package="z"))
    plugins = load_plugins()
    assert sorted(plugins.manager.hook.deepspec_greeted(name="you")) == ["a", "z"]


def test_hooks_of_a_plugin_that_fails_go_with_it_and_blame_goes_to_the_right_plugin(distributions: Any) -> None:
    distributions.add("fake-a", GREETED.format(argument="wrong", package="a"))
    distributions.add("fake-m", ADDS)
    assert record(load_plugins(), "fake-m").status == "ok"
    assert "wrong" in str(record(load_plugins(), "fake-a").reason)
    blocked = load_plugins(blocked=["fake-m"])
    assert str(record(blocked, "fake-a").reason).startswith("unknown hook 'deepspec_greeted'")


COMPLETE = """
    from deepspec_core.plugins import hooks as hookspecs
    CALLS = []

    def spec(cls, **more):
        return cls(name="complete", summary="one of each", build="json:dumps", **more)

    @hookimpl
    def deepspec_draft_models():
        yield spec(DraftModelSpec, class_suffix="CompleteModel", options_of="json:loads")

    @hookimpl
    def deepspec_losses():
        return [spec(ComponentSpec)]

    @hookimpl
    def deepspec_weightings():
        return (spec(ComponentSpec),)

    @hookimpl
    def deepspec_target_adapters():
        return [spec(TargetAdapterSpec, model_types=("complete",))]

    @hookimpl
    def deepspec_cache_formats():
        return [spec(ComponentSpec)]

    @hookimpl
    def deepspec_feature_sources():
        return [spec(ComponentSpec)]

    @hookimpl
    def deepspec_tasks():
        return [spec(TaskSpec)]

    @hookimpl
    def deepspec_builtins():
        return [spec(BuiltinSpec, kind="model")]

    @hookimpl
    def deepspec_exporters():
        return [spec(ExportSpec, algorithm="complete")]

    @hookimpl
    def deepspec_commands(cli):
        CALLS.append(("commands", cli))

    @hookimpl
    def deepspec_addhooks(manager):
        CALLS.append(("addhooks", manager))

    @hookimpl
    def deepspec_checkpoint_saved(run, checkpoint):
        CALLS.append(("checkpoint", run, checkpoint))

    @hookimpl
    def deepspec_evaluation_finished(run, report):
        CALLS.append(("evaluation", run, report))
"""


def test_every_hook_is_documented_and_reaches_a_plugin_that_implements_them_all(distributions: Any) -> None:
    module = distributions.add("fake-complete", COMPLETE)
    plugins = load_plugins()
    assert record(plugins, "fake-complete").status == "ok"
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("deepspec_") and callable(hook)}
    complete = sys.modules[module]
    for name, hook in hooks.items():
        assert inspect.getdoc(hook), f"{name} has no contract"
        assert hasattr(complete, name), f"the complete plugin lacks {name}"

    offering = {kind.hook for kind in KINDS.values()}
    for kind in KINDS:
        algorithm = "complete" if kind == "exporter" else None
        assert plugins.registry.load(kind, "complete", algorithm=algorithm).__name__ == "dumps"
    assert plugins.registry.adapter_for("complete").name == "complete"

    caller, cli = plugins.manager.hook, click.Group()
    caller.deepspec_commands(cli=cli)
    caller.deepspec_checkpoint_saved(run="run", checkpoint="folder")
    caller.deepspec_evaluation_finished(run="run", report={})
    calls = list(complete.CALLS)
    assert calls == [
        ("addhooks", plugins.manager),
        ("commands", cli),
        ("checkpoint", "run", "folder"),
        ("evaluation", "run", {}),
    ]
    notices = {"deepspec_commands", "deepspec_addhooks", "deepspec_checkpoint_saved", "deepspec_evaluation_finished"}
    assert set(hooks) == offering | notices


def test_required_plugins(distributions: Any) -> None:
    distributions.add("fake-broken", "1 / 0\n")
    distributions.add("fake-nice", LOSS.format(name="nice"), version="1.5")
    plugins = load_plugins()
    assert check_required(["fake-nice>=1,<2", "Fake_Nice", f"deepspec-core=={__version__}"], plugins) == []
    errors = check_required(["fake-nice>=2", "fake-nicer", "fake-broken", "unheard-of>=3", ">=1"], plugins)
    assert [error.where for error in errors] == [f"required_plugins[{index}]" for index in range(5)]
    newer, nearly, broken, unheard, malformed = errors
    assert (newer.found, newer.expected) == ("fake-nice 1.5", "fake-nice>=2")
    assert nearly.fix == "write 'fake-nice'"
    assert "ZeroDivisionError" in str(broken.found)
    assert unheard.fix == "pip install 'unheard-of>=3'"
    assert malformed.problem == "not a requirement"


def test_loading_plugins_imports_no_torch() -> None:
    code = (
        "import sys; from deepspec_core.plugins.discovery import load_plugins; load_plugins();"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'cattrs', 'tomli', 'rich')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
