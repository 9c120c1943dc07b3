"""Code of a plugin that fails is told as the plugin's, with its package and what it raised; no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.plugins.discovery import load_plugins

OFFERS = """
    from deepspec_core.plugins import ComponentSpec, TaskSpec, hookimpl

    TERMS = "unbuilt raising scalar column number whole right late leaving backwards nan unsaid letters secret detached"
    WEIGHTS = ("text", "single", "counted", "endless", "below", "none")

    @hookimpl
    def deepspec_losses():
        return [
            ComponentSpec(name=name, summary="", build=f"odd_parts:{name}")
            for name in TERMS.split()
        ]

    @hookimpl
    def deepspec_weightings():
        return [
            ComponentSpec(name=name, summary="", build=f"odd_parts:{build}")
            for name, build in [("heavy", "raising"), *((name, name) for name in WEIGHTS)]
        ]

    @hookimpl
    def deepspec_feature_sources():
        offers = {"nowhere": "refuses", "leaving": "make_leaving", "lost": "gone", "sizeless": "Sizeless"}
        offers |= {"made": "make_sizeless", "text": "TEXT"}
        return [ComponentSpec(name=name, summary="", build=f"odd_parts:{part}") for name, part in offers.items()]

    @hookimpl
    def deepspec_cache_formats():
        offers = {"stone": "refuses", "headless": "Headless"}
        return [ComponentSpec(name=name, summary="", build=f"odd_parts:{part}") for name, part in offers.items()]

    @hookimpl
    def deepspec_tasks():
        return [
            TaskSpec(name="riddles", summary="", build="odd_parts:refuses"),
            TaskSpec(name="exits", summary="", build="odd_parts:leaves"),
            TaskSpec(name="puzzles", summary="", build="odd_parts:one_and_no_more"),
        ]
"""
PARTS = """
    import sys
    import torch

    class Term:
        needs_target = False
        needs_extras = ()

        def __init__(self, value=None):
            self.value = value

        def __call__(self, stats):
            return self.value(stats)

    class raising(Term):
        def __call__(self, *_):
            raise KeyError("of the odd one")

    def unbuilt():
        return {}["of the odd one"]

    def refuses(*_):
        raise KeyError("of the odd one")

    def leaves(*_):
        sys.exit(0)

    def one_and_no_more(limit, seed):
        yield {"turns": ["one"]}
        raise KeyError("of the odd one")

    def fail(_):
        raise KeyError("of the odd one")

    def hooked(stats):
        value = stats.ce * 1.0
        value.register_hook(fail)
        return value

    class Sizeless:
        def __init__(self, run):
            pass

        lengths = __getitem__ = features = fail

    class Leaving(Sizeless):
        __len__ = leaves

    make_leaving = lambda run: Leaving(run)
    make_sizeless = lambda run: Sizeless(run)
    TEXT = "no source"

    class Headless:
        create = open = verify = bytes_per_token = fail

    scalar = lambda: Term(lambda stats: stats.ce.mean())
    column = lambda: Term(lambda stats: stats.ce[:, None])
    number = lambda: Term(lambda stats: 1.0)
    whole = lambda: Term(lambda stats: stats.draft_argmax)
    right = lambda: Term(lambda stats: stats.ce)
    late = lambda: Term(lambda stats: stats.ce if len(stats.ce) == 4 else fail(stats))
    leaving = lambda: Term(lambda stats: stats.ce if len(stats.ce) == 4 else leaves())
    backwards = lambda: Term(hooked)
    detached = lambda: Term(lambda stats: stats.ce.detach())
    unsaid = lambda: lambda stats: stats.ce
    secret = lambda: Term(lambda stats: stats.tv)

    def letters():
        term = Term(lambda stats: stats.ce)
        term.needs_extras = "confidence"
        return term
    nan = lambda: Term(lambda stats: stats.ce * float("nan"))
    text = lambda: lambda slot, block, stats: "heavy"
    single = lambda: lambda slot, block, stats: torch.ones(())
    counted = lambda: lambda slot, block, stats: slot
    endless = lambda: lambda slot, block, stats: 1 / slot
    below = lambda: lambda slot, block, stats: -torch.ones(len(slot))
    none = lambda: lambda slot, block, stats: torch.zeros(len(slot))
"""


@pytest.fixture(autouse=True)
def _odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `fake-odd` 1.0 as if installed."""
    folder = tmp_path / "installed"
    info = folder / "fake_odd-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-odd\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deepspec]\nodd = odd_offers\n")
    (folder / "odd_offers.py").write_text(dedent(OFFERS))
    (folder / "odd_parts.py").write_text(dedent(PARTS))
    monkeypatch.syspath_prepend(str(folder))
    for module in ("odd_offers", "odd_parts"):
        monkeypatch.delitem(sys.modules, module, raising=False)


Says = Callable[..., None]


@pytest.fixture
def says(run_file: Path, capsys: pytest.CaptureFixture[str]) -> Says:
    """says(*overrides, parts=(...)): the run ends with exit code 2 and says these parts and the package.

    `started`: whether a stage has begun by then.
    """

    def check(*overrides: str, parts: tuple[str, ...], started: bool = False, package: str = "fake-odd") -> None:
        arguments = [word for text in overrides for word in ("--set", text)]
        assert main(["run", str(run_file), "--smoke", *arguments]) == 2
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err
        assert ("starting" in seen.out) == started
        for part in (*parts, package):
            assert part in seen.err, f"{part!r} is not in:\n{seen.err}"

    return check


RAISED = "KeyError: 'of the odd one'"


@pytest.mark.parametrize("name", ["unbuilt", "raising", "backwards"])
def test_a_loss_term(says: Says, name: str) -> None:
    says(f"loss.terms={{ce=1.0,{name}=1.0}}", parts=(f"loss term {name!r}", "fail", RAISED, "odd_parts.py"))


def test_a_weighting(says: Says) -> None:
    says('loss.weighting={type="heavy"}', parts=("weighting 'heavy' of fake-odd 1.0 failed", RAISED, "odd_parts.py"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("text", "str"),
        ("single", "[], torch.float32"),
        ("counted", "int64"),
        ("endless", "not finite: [inf, 1.0, inf, 1.0]"),
        ("below", "a negative weight: -1"),
        ("none", "0 for every row"),
    ],
)
def test_a_weighting_that_returns_no_weight_a_row(says: Says, name: str, found: str) -> None:
    says(f'loss.weighting={{type="{name}"}}', parts=(f"weighting {name!r} does not return one weight per row", found))


@pytest.mark.parametrize(("name", "raised"), [("late", RAISED), ("leaving", "SystemExit: 0")])
def test_a_loss_term_that_fails_while_training(says: Says, name: str, raised: str) -> None:
    says(f"loss.terms={{{name}=1.0}}", parts=(f"loss term {name!r} of fake-odd 1.0 failed", raised), started=True)


def test_a_task_that_calls_sys_exit(says: Says) -> None:
    says('evaluate.tasks=["exits"]', parts=("task 'exits' of fake-odd 1.0 failed", "SystemExit: 0", "odd_parts.py"))


def test_a_part_that_calls_sys_exit_where_nobody_expects_an_error(says: Says) -> None:
    parts = ("code of a plugin called sys.exit()", "SystemExit: 0", "odd_parts.py")
    says("features.mode=leaving", parts=parts, package="odd_parts", started=True)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("scalar", "[], torch.float32"),
        ("column", "[4, 1], torch.float32"),
        ("number", "float"),
        ("whole", "int64"),
        ("nan", "not finite"),
    ],
)
def test_a_loss_term_that_returns_no_number_a_row(says: Says, name: str, found: str) -> None:
    says(f"loss.terms={{{name}=1.0}}", parts=(f"loss term {name!r} does not return one number per row", found, "[4]"))


def test_a_loss_term_that_gives_no_gradient(says: Says) -> None:
    says("loss.terms={ce=1.0,detached=1.0}", parts=("loss term 'detached' gives no gradient", "detached"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unsaid", ("'unsaid' is not a loss term", "without needs_target, needs_extras")),
        ("letters", ("'letters' is not a loss term", "needs_extras = 'confidence'")),
        ("secret", ("loss term 'secret' reads the target's distribution", "needs_target = True")),
    ],
)
def test_a_loss_term_that_does_not_say_what_it_reads(says: Says, name: str, parts: tuple[str, ...]) -> None:
    says(f"loss.terms={{{name}=1.0}}", parts=parts)


@pytest.mark.parametrize(
    ("override", "what", "started"),
    [
        ("features.mode=nowhere", "feature source 'nowhere'", True),
        ('evaluate.tasks=["riddles"]', "evaluation task 'riddles'", False),
        ('evaluate.tasks=["puzzles"]', "evaluation task 'puzzles'", False),
    ],
)
def test_a_component_that_cannot_be_built(says: Says, override: str, what: str, started: bool) -> None:
    says(override, parts=(f"{what} of fake-odd 1.0 failed", RAISED, "odd_parts.py"), started=started)


def test_a_cache_format_that_cannot_be_built(says: Says) -> None:
    says("features.mode=cached", "cache.format=stone", parts=("cache format 'stone' of fake-odd 1.0 failed", RAISED))


@pytest.mark.parametrize(
    ("overrides", "found", "started"),
    [
        (("features.mode=lost",), "has no 'gone'", False),
        (("features.mode=sizeless",), "Sizeless without __len__", False),
        (("features.mode=text",), "str, which cannot be called", False),
        (("features.mode=made",), "Sizeless without __len__", True),
        (
            ("features.mode=cached", "cache.format=headless", 'run.stages=["cache", "train"]'),
            "Headless without header",
            False,
        ),
    ],
)
def test_a_component_without_what_it_needs(says: Says, overrides: tuple[str, ...], found: str, started: bool) -> None:
    says(*overrides, parts=(found,), started=started)


def test_the_original_error_is_the_cause() -> None:
    from deepspec_core.errors import PluginError

    registry: Any = load_plugins().registry
    with pytest.raises(PluginError) as caught:
        registry.build("cache", "stone")
    assert isinstance(caught.value.__cause__, KeyError)
    term = registry.build_guarded("loss", "raising")
    assert term.needs_extras == ()
    with pytest.raises(PluginError) as caught:
        term(None)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.where == "odd_parts:raising"
