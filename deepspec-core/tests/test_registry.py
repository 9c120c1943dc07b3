"""Looking components up by kind and name, and what is said where a name is not there."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from deepspec_core.errors import PluginError, TargetError
from deepspec_core.plugins.records import PluginRecord
from deepspec_core.plugins.references import resolve
from deepspec_core.plugins.registry import KINDS, Offer, Registry
from deepspec_core.plugins.specs import ComponentSpec, DraftModelSpec, ExportSpec, TargetAdapterSpec


def offer(kind: str, spec: ComponentSpec, package: str = "fake-one") -> Offer:
    return Offer(kind=kind, spec=spec, plugin=package, package=package, version="1.0")


def loss(name: str, build: str = "math:sqrt") -> ComponentSpec:
    return ComponentSpec(name=name, summary="", build=build)


def adapter(name: str, *model_types: str) -> TargetAdapterSpec:
    return TargetAdapterSpec(name=name, summary="", build="math:sqrt", model_types=model_types)


def export(algorithm: str) -> ExportSpec:
    return ExportSpec(name="engine", summary="", build=f"math:{algorithm}", algorithm=algorithm)


def test_components_are_found_by_kind_and_name_and_imported_on_load() -> None:
    spec = loss("root")
    registry = Registry([offer("loss", spec), offer("weighting", loss("root", "math:cos"))])
    assert registry.get("loss", "root") is spec
    assert registry.names("loss") == ["root"]
    assert registry.names("cache") == []
    assert registry.provider("loss", "root") == "fake-one"
    assert registry.load("loss", "root")(9.0) == 3.0
    assert registry.load("weighting", "root")(0.0) == 1.0


def test_an_unknown_name_says_what_is_installed_and_the_nearest() -> None:
    registry = Registry([offer("loss", loss("entropy")), offer("loss", loss("variation"))])
    with pytest.raises(PluginError) as caught:
        registry.get("loss", "entrpy")
    assert caught.value.found == "entrpy"
    assert caught.value.expected == "one of entropy, variation"
    assert caught.value.fix == "write 'entropy'"


def test_an_unknown_name_points_at_the_plugin_that_was_left_out() -> None:
    left_out = [
        PluginRecord(name="wave", package="deepspec-wave", version="2.0", status="broken", reason="ImportError: no"),
        PluginRecord(
            name="other", package="deepspec-other", version="1.0", status="blocked", reason="--no-plugin other"
        ),
    ]
    registry = Registry([offer("draft", draft("toy"))], left_out)
    with pytest.raises(PluginError) as caught:
        registry.get("draft", "wave")
    assert caught.value.fix == "plugin 'wave' of deepspec-wave 2.0 may offer it, but is broken: ImportError: no"
    with pytest.raises(PluginError) as caught:
        registry.get("draft", "zzz")
    assert "deepspec-wave" in str(caught.value.fix)
    assert "deepspec-other 1.0 may offer it, but is blocked" in str(caught.value.fix)


def draft(name: str, recognise: Any = lambda config: False) -> DraftModelSpec:
    return DraftModelSpec(
        name=name, summary="", build="math:sqrt", class_suffix="Model", options_of="math:sqrt", recognise=recognise
    )


def test_an_unknown_draft_type_suggests_a_package_of_its_name() -> None:
    with pytest.raises(PluginError, match="pip install deepspec-some-draft") as caught:
        Registry().get("draft", "some_draft")
    assert caught.value.expected == "one of none: no installed plugin offers any"


def test_export_formats_are_keyed_by_algorithm_too() -> None:
    registry = Registry([offer("exporter", export("sin")), offer("exporter", export("cos"), "fake-two")])
    assert registry.names("exporter") == ["engine"]
    assert registry.algorithms("exporter", "engine") == ["cos", "sin"]
    assert registry.load("exporter", "engine", algorithm="cos")(0.0) == 1.0
    assert registry.provider("exporter", "engine", algorithm="cos") == "fake-two"
    assert registry.conflicts() == []
    with pytest.raises(PluginError) as caught:
        registry.get("exporter", "engine", algorithm="tan")
    assert caught.value.expected == "a draft of type one of cos, sin"
    with pytest.raises(PluginError, match="unknown export format 'engin'") as caught:
        registry.get("exporter", "engin", algorithm="cos")
    assert caught.value.fix == "write 'engine'"


def test_adapters_are_chosen_by_model_type() -> None:
    registry = Registry([offer("target", adapter("family", "family", "family_text"))])
    assert registry.adapter_for("family_text").name == "family"
    with pytest.raises(TargetError) as caught:
        registry.adapter_for("famly")
    assert caught.value.expected == "one of family, family_text"
    assert caught.value.fix == "write 'family'"
    with pytest.raises(TargetError) as caught:
        Registry().adapter_for("family")
    assert caught.value.fix == "pip install deepspec-targets"


def test_two_adapters_for_one_model_type_fail_only_for_that_type() -> None:
    offers = [offer("target", adapter("a", "shared", "own")), offer("target", adapter("b", "shared"), "fake-two")]
    registry = Registry(offers)
    assert registry.adapter_for("own").name == "a"
    with pytest.raises(PluginError, match="target model type 'shared' is offered more than once") as caught:
        registry.adapter_for("shared")
    assert caught.value.found == "fake-one 1.0 and fake-two 1.0"


def test_a_checkpoint_is_recognised_by_exactly_one_algorithm() -> None:
    first = offer("draft", draft("first", lambda config: config.get("kind") in ("first", "both")))
    second = offer("draft", draft("second", lambda config: config.get("kind") in ("second", "both")))
    registry = Registry([first, second])
    assert registry.recognise({"kind": "second"}).name == "second"
    with pytest.raises(PluginError, match="no installed algorithm"):
        registry.recognise({"kind": "third"})
    with pytest.raises(PluginError, match=r"more than one algorithm.*first, second") as caught:
        registry.recognise({"kind": "both"})
    assert caught.value.found == "'first' of fake-one 1.0, 'second' of fake-one 1.0"
    assert "--no-plugin fake-one" in str(caught.value.fix)
    careless = offer("draft", draft("careless", lambda config: config["nothing"]))
    with pytest.raises(PluginError, match=r"'careless' of fake-one 1\.0 failed on a checkpoint"):
        Registry([first, careless]).recognise({"kind": "first"})


def test_a_class_name_of_another_project_is_its_installed_draft_types() -> None:
    """Only the whole of a class name: what merely ends so is no other's, and other signs are still refused."""

    def is_wave(config: Any) -> bool:
        return "WaveModel" in config["architectures"]

    knows = evolve(draft("knows"), elsewhere={"WaveModel": "another project's", "wave_type": "its key"})
    wave = evolve(draft("wave", is_wave), class_suffix="WaveModel")
    with pytest.raises(PluginError, match="another project's format"):
        Registry([offer("draft", knows)]).recognise({"architectures": ["WaveModel"]})
    both = Registry([offer("draft", knows), offer("draft", wave, "fake-two")])
    assert both.recognise({"architectures": ["WaveModel"]}).name == "wave"
    with pytest.raises(PluginError, match="another project's format"):
        both.recognise({"architectures": ["WaveModel"], "wave_type": 1})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ("no_such_module_here:Loss", "ModuleNotFoundError"),
        ("math:sqroot", "name 'sqrt' instead"),
        ("fake_raises:Loss", r"ValueError: heavy \(.*fake_raises.py:2\)"),
    ],
)
def test_a_component_that_cannot_be_loaded_names_its_plugin(distributions: Any, build: str, message: str) -> None:
    distributions.add("fake-heavy", "", extra_modules={"fake_raises": "import math\nraise ValueError('heavy')\n"})
    registry = Registry([offer("loss", loss("heavy", build))])
    with pytest.raises(PluginError, match=r"loss term 'heavy' of fake-one 1\.0 cannot be loaded") as caught:
        registry.load("loss", "heavy")
    assert caught.match(message)
    assert caught.value.where == build


def test_resolve_follows_dotted_attributes() -> None:
    import json

    assert resolve("json.decoder:JSONDecoder.decode") is json.JSONDecoder.decode


def test_the_table_of_kinds_covers_every_hook_that_offers() -> None:
    from deepspec_core.plugins import hooks as hookspecs

    offering = {name for name in vars(hookspecs) if name.startswith("deepspec_")} - {
        "deepspec_commands",
        "deepspec_addhooks",
        "deepspec_checkpoint_saved",
        "deepspec_evaluation_finished",
    }
    assert {kind.hook for kind in KINDS.values()} == offering
