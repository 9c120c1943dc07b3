"""What tests of every package share: the installed plugins and the recorded vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.recorded import Recordings


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Every installed plugin's offers."""
    return load_plugins().registry


@pytest.fixture(scope="session")
def recordings(registry: Registry) -> Recordings:
    """The recorded vectors of the published implementation."""
    return Recordings(folder=Path(__file__).parent / "tests" / "parity", registry=registry)


@pytest.fixture(params=["qwen3", "gemma4"])
def family(request: pytest.FixtureRequest) -> str:
    """Each family with recorded vectors."""
    return str(request.param)
