"""Notices to plugins: each gets them, one that fails is reported by name, and what follows goes on."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.notices import notify

TELLS = """
    TOLD = []

    @hookimpl
    def deepspec_checkpoint_saved(checkpoint):
        TOLD.append(checkpoint)
"""
FAILS = """
    @hookimpl
    def deepspec_checkpoint_saved(run, checkpoint):
        raise OSError("no luck")
"""


@pytest.mark.parametrize(("raised", "told_as"), [('OSError("no luck")', "OSError"), ("SystemExit(0)", "SystemExit: 0")])
def test_a_notice_that_fails_is_reported_and_reaches_the_others(
    distributions: Any, caplog: pytest.LogCaptureFixture, raised: str, told_as: str
) -> None:
    fails = FAILS.replace('OSError("no luck")', raised)
    for package, source in (("fake-a", TELLS), ("fake-b", fails), ("fake-c", TELLS)):
        distributions.add(package, source)
    manager = load_plugins().manager
    with caplog.at_level(logging.WARNING):
        notify(manager, "deepspec_checkpoint_saved", run="run", checkpoint="folder")
    told = [plugin.TOLD for plugin in manager.get_plugins() if hasattr(plugin, "TOLD")]
    assert told == [["folder"], ["folder"]]
    [message] = caplog.messages
    assert message.startswith(
        f"plugin fake-b/fake-b failed in deepspec_checkpoint_saved, and the run goes on: {told_as}"
    )
    assert "fake_b_plugin.py" in message


def test_a_stop_is_no_failure(distributions: Any) -> None:
    distributions.add("fake-d", FAILS.replace('OSError("no luck")', "KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        notify(load_plugins().manager, "deepspec_checkpoint_saved", run="run", checkpoint="folder")
