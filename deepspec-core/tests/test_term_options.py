"""A loss term with options of its own: how a run file gives them, where they show, and that they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_file_loading import GOOD, Loader

from deepspec_core.cli.main import main
from deepspec_core.config.render import render
from deepspec_core.config.schema import TermOptions
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.pipeline.fingerprint import flatten
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule
from deepspec_core.rows.engine import build_engine

PLUGIN = '''
from attrs import field, frozen
from attrs.validators import gt

@frozen(kw_only=True)
class TemperedOptions:
    """KL at a temperature.

    temperature: What both logits are divided by.
    """

    temperature: float = field(default=2.0, validator=gt(0.0))
    squared: bool = False

@hookimpl
def deepspec_losses():
    yield ComponentSpec(
        name="tempered", summary="KL at a temperature.", build="tempered_term:Tempered", options=TemperedOptions
    )
'''
TERM = """
class Tempered:
    needs_target = needs_logits = True
    needs_extras = ()

    def __init__(self, options):
        self.temperature, self.scale = options.temperature, options.temperature**2 if options.squared else 1.0

    def __call__(self, stats):
        log_q = (stats.draft_logits / self.temperature).log_softmax(-1)
        log_p = (stats.target_logits / self.temperature).log_softmax(-1)
        return self.scale * (log_p.exp() * (log_p - log_q)).sum(-1)
"""


@pytest.fixture
def tempered(load: Loader, toy: Any) -> Loader:
    """Loads run files where a plugin offers the term `tempered`."""
    toy.add("fake-tempered", PLUGIN, extra_modules={"tempered_term": TERM})
    load.plugins = load_plugins()
    return load


def terms(loader: Loader, written: str, *overrides: str) -> dict[str, Any]:
    return loader(f"{GOOD}[loss]\nterms = {{{written}}}\n", *overrides).loss.terms


def test_options_stand_beside_the_coefficient(tempered: Loader) -> None:
    table = terms(tempered, "tempered = {coefficient = 1, temperature = 4}, ce = {coefficient = 0.1}")
    entry = table["tempered"]
    assert isinstance(entry, TermOptions)
    assert (entry.coefficient, entry.options.temperature, entry.options.squared) == (1.0, 4.0, False)
    assert table["ce"] == 0.1
    plain = terms(tempered, "tempered = 0.5")["tempered"]
    assert plain == terms(tempered, "tempered = {coefficient = 0.5, temperature = 2}")["tempered"]
    schedule = CoefficientSchedule(start=0.0, end=1.0, steps=5)
    for written in ("start = 0, end = 1, steps = 5", "coefficient = {start = 0, end = 1, steps = 5}"):
        changing = terms(tempered, f"tempered = {{{written}, temperature = 3}}")["tempered"]
        assert (changing.coefficient, changing.options.temperature) == (schedule, 3.0)
    assert terms(tempered, "tempered = {start = 0, end = 1, steps = 5}")["tempered"].coefficient == schedule
    changed = terms(tempered, "tempered = {coefficient = 1, temperature = 4}", "loss.terms.tempered.temperature=8")
    assert changed["tempered"].options.temperature == 8.0


@pytest.mark.parametrize(
    ("entry", "where", "found", "expected", "fix"),
    [
        (
            "{coefficient = 1, temprature = 2}",
            ".temprature",
            "temprature",
            "one of coefficient, temperature, squared",
            "write 'temperature'",
        ),
        (
            "{start = 0, end = 1, stpes = 2, steps = 3}",
            ".stpes",
            "stpes",
            "one of start, end, steps, after, shape, temperature, squared",
            "write 'steps'",
        ),
        ("{temperature = 2}", ".coefficient", None, "a number or a table", None),
        ("{coefficient = 1, temperature = 0}", ".temperature", "0.0 (a number)", "a number, > 0", None),
        ("{coefficient = 1, temperature = '2'}", ".temperature", '"2" (text)', "a number", None),
        ("{coefficient = 1e300}", ".coefficient", "1e+300 (a number)", "a number, <= 1000000", None),
        ("{coefficient = 'x'}", ".coefficient", '"x" (text)', "a number or a table", None),
        ("'x'", "", '"x" (text)', "a number or a table", None),
        ("{start = 0, steps = 2}", ".end", None, "a number", None),
    ],
)
def test_a_mistake_is_told_with_its_path(
    tempered: Loader, entry: str, where: str, found: str | None, expected: str, fix: str | None
) -> None:
    [(path, problem)] = tempered.problems(f"{GOOD}[loss]\nterms = {{tempered = {entry}}}\n").items()
    assert path == f"loss.terms.tempered{where}"
    assert (problem.found, problem.fix) == (found, fix)
    assert str(problem.expected).startswith(expected)


def test_a_term_without_options_takes_none(tempered: Loader) -> None:
    problems = tempered.problems(f"{GOOD}[loss]\nterms = {{ce = {{coefficient = 1, temperature = 2}}}}\n")
    assert problems["loss.terms.ce.temperature"].expected == "one of coefficient"


def test_options_show_where_settings_show(tempered: Loader, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{GOOD}[loss]\nterms = {{ce = 1, tempered = {{coefficient = 0.5, temperature = 4}}}}\n"
    file = tempered(text)
    flat = flatten(file)
    assert {key: value for key, value in flat.items() if key.startswith("loss.terms")} == {
        "loss.terms.ce": 1.0,
        "loss.terms.tempered.coefficient": 0.5,
        "loss.terms.tempered.temperature": 4.0,
        "loss.terms.tempered.squared": False,
    }
    assert tempered(render(file)) == file
    assert main(["config", "keys", "loss"]) == 0
    said = capsys.readouterr().out
    assert 'loss.terms (term "tempered")' in said
    assert "What both logits are divided by." in said


def test_a_term_cannot_take_a_key_of_core_s(distributions: Any) -> None:
    distributions.add("fake-start", PLUGIN.replace("squared", "start"))
    [record] = [record for record in load_plugins().records if record.package == "fake-start"]
    assert "options of 'tempered' use a key that core keeps: 'start'" in str(record.reason)


def test_the_term_computes_with_them(tempered: Loader) -> None:
    """And in the chunks of the row engine, as a plain loop does."""
    text = f"{GOOD}[loss]\nchunk_rows = 3\nterms = {{tempered = {{start = 1, end = 3, steps = 4, temperature = 4}}}}\n"
    engine = build_engine(tempered(text).loss, tempered.plugins.registry)
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    head_VH = torch.randn(11, 5, dtype=torch.float64, generator=generator)
    rows = Rows(
        hidden=hidden_NH,
        target_hidden=torch.randn(7, 5, dtype=torch.float64, generator=generator),
        target_index=torch.arange(7),
        weight=torch.ones(7, dtype=torch.float64),
        slot=torch.zeros(7, dtype=torch.int64),
        block=torch.arange(7),
    )
    result = engine(rows, Heads(draft=head_VH, target=head_VH), step=2)
    assert rows.target_hidden is not None
    log_q_NV = F.log_softmax(hidden_NH @ head_VH.T / 4, dim=-1)
    log_p_NV = F.log_softmax(rows.target_hidden @ head_VH.T / 4, dim=-1)
    expected = 2 * F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="sum")
    torch.testing.assert_close(result.total, expected)
    torch.testing.assert_close(torch.autograd.grad(result.total, hidden_NH), torch.autograd.grad(expected, hidden_NH))
