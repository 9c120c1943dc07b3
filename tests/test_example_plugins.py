"""The plugins under examples/plugins do what their READMEs say, found as installed ones are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepspec_core.cli.main import main
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.weightings import Uniform


@pytest.fixture
def hellinger(example_plugin: Callable[[str], None]) -> None:
    example_plugin("deepspec-hellinger")


@pytest.mark.usefixtures("hellinger")
def test_the_loss_plugin_is_found_checked_and_right(run_file: Path) -> None:
    assert main(["config", "check", str(run_file), "--set", "loss.terms={hellinger = 1.0}"]) == 0
    term = load_plugins().registry.load("loss", "hellinger")()
    torch.manual_seed(0)
    rows, vocabulary, hidden = 6, 40, 8
    draft, target = torch.randn(vocabulary, hidden), torch.randn(vocabulary, hidden)
    states, seen = torch.randn(rows, hidden, requires_grad=True), torch.randn(rows, hidden)
    result = RowEngine({"hellinger": (term, 1.0)}, Uniform())(
        Rows(
            hidden=states,
            target_hidden=seen,
            target_index=torch.arange(rows),
            target_ids=torch.zeros(rows, dtype=torch.long),
            weight=torch.ones(rows),
            slot=torch.zeros(rows, dtype=torch.long),
            block=torch.arange(rows),
        ),
        Heads(draft=draft, target=target),
    )
    p, q = ((x @ head.T).double().softmax(-1) for x, head in ((seen, target), (states.detach(), draft)))
    assert result.total.item() == pytest.approx(((p.sqrt() - q.sqrt()) ** 2).sum().item() / 2, rel=1e-5)
    result.total.backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 0
