"""The plugins under examples/plugins do what their READMEs say, found as installed ones are."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deepspec_npz_cache.npz import NpzFormat

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.pipeline.trying_cache import lost_by
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3"])
def test_the_cache_plugin_keeps_what_the_trial_writes(dtype: str) -> None:
    header = CacheHeader(
        target="t", revision="", adapter="tiny", taps=(0, 2), hidden_size=8, vocab_size=16, dtype=dtype, tokenizer="",
        template="", max_length=64, source="", plugins={},
    )  # fmt: skip
    assert lost_by(NpzFormat(), header) is None


def test_a_run_trains_on_the_cache_plugins_cache(
    example_plugin: Callable[[str], None], finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Samples and losses are those of a run with core's own format."""
    example_plugin("deepspec-npz-cache")
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    own = HDF5Format().open(folder / "cache", None)
    features, loss = [own[index].features for index in range(len(own))], _last_loss(folder)
    again = ["--stages", "cache,train", "--force", "cache,train,evaluate"]
    run = ["run", str(finished_copy), "--smoke", "--set", "run.threads=1", "--set", "cache.format=npz"]
    assert main([*run, *again]) == 0, capsys.readouterr().err
    assert [path.name for path in (folder / "cache").glob("shard-*")] == ["shard-00000.npz"]
    assert main(["cache", "verify", str(folder / "cache")]) == 0
    found = NpzFormat().open(folder / "cache", None)
    assert found.ids() == own.ids()
    for index, expected in enumerate(features):
        assert torch.equal(found[index].features.hidden, expected.hidden)
    assert _last_loss(folder) == pytest.approx(loss, rel=1e-4)


def _last_loss(folder: Path) -> float:
    return float(json.loads((folder / "train" / "metrics.jsonl").read_text().splitlines()[-1])["loss"])
