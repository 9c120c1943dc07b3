"""The names of training's figures are documented; conftest.py checks every line that a test writes against them."""

from pathlib import Path

from deepspec_core.training.figures_reference import FIGURES, figure_of, markdown
from deepspec_core.training.metrics_lines import HELD_OUT_LENGTH

PAGE = Path(__file__).parents[1] / "docs" / "training-figures.md"


def test_the_page_has_every_name() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), (
        "make docs/training-figures.md again from figures_reference.py"
    )


def test_a_name_is_one_figure_and_others_are_unknown() -> None:
    names = [one.name.replace("{k}", "12").replace("{term}", "soft_ce") for one in FIGURES]
    assert {"accuracy@12", "loss/soft_ce", HELD_OUT_LENGTH} <= set(names)
    for name in names:
        assert sum(one.is_named(name) for one in FIGURES) == 1, name
    for name in ("accuracy@", "accuracy@x", "losses", "steps"):
        assert figure_of(name) is None
