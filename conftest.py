"""What tests of every package share: the installed plugins and the recorded vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.pipeline.threads import let_waiting_threads_sleep

# Before anything imports PyTorch: a test run is rarely alone on its machine.
let_waiting_threads_sleep()
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many processes as cores share the tests: each computes with one thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.evaluation import metrics_file
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.recorded import Recordings
from deepspec_core.testing.shifted import shifted


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of weights are remembered in a folder of the test run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def metrics_files_are_as_documented() -> Iterator[None]:
    """Every metrics.json that a test's own process writes is checked against the JSON Schema."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(metrics_file.schema())
    write = metrics_file.write_json

    def checked(path: Path, content: Mapping[str, Any]) -> None:
        write(path, content)
        validator.validate(json.loads(path.read_text(encoding="utf-8")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "write_json", checked)
        yield


@pytest.fixture(scope="session", autouse=True)
def figures_of_training_are_documented() -> Iterator[None]:
    """Every name in a line of metrics.jsonl that a test's own process writes is in docs/training-figures.md."""
    from deepspec_core.training.figures_reference import figure_of
    from deepspec_core.training.metrics import MetricsLog

    write = MetricsLog.write

    def checked(log: MetricsLog, figures: Mapping[str, Any]) -> None:
        unknown = [name for name in figures if figure_of(name) is None]
        assert not unknown, f"names that training/figures_reference.py does not have: {unknown}"
        write(log, figures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", checked)
        yield


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Every installed plugin's offers."""
    return load_plugins().registry


@pytest.fixture
def reloaded(registry: Registry) -> Callable[[DraftModel, TargetAdapter, Path], DraftModel]:
    """reloaded(draft, adapter, folder): the draft, written there and read back, its weights at shifted addresses.

    A bitwise comparison of the two thus fails on every machine.
    """

    def reload(draft: DraftModel, adapter: TargetAdapter, folder: Path) -> DraftModel:
        save_draft(draft, adapter, folder)
        return shifted(load_draft(folder, registry=registry, adapter=adapter))

    return reload


@pytest.fixture(scope="session")
def recordings(registry: Registry) -> Recordings:
    """The recorded vectors of the published implementation."""
    return Recordings(folder=Path(__file__).parent / "tests" / "parity", registry=registry)


@pytest.fixture(params=["qwen3", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    """Each family with recorded vectors."""
    return str(request.param)
