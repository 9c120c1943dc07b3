"""The Hub that cannot be reached: one short answer instead of minutes of tries, and the libraries told once."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from deepspec_core import hub
from deepspec_core.checkpoints.opening import resolve_draft
from deepspec_core.config.schema import SourceOptions
from deepspec_core.data.sources import read_sources
from deepspec_core.errors import CheckpointError, DataError, TargetError
from deepspec_core.targets.opening import open_adapter, tokenizer_for
from deepspec_core.testing.core_registry import core_registry


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test asks anew; no mode is left behind."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_found", hub._Found())
    yield
    hub._switch(offline=False)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A port of this machine where nobody listens; the list counts how often it was asked."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked: list[int] = []
    ask = hub._ask
    monkeypatch.setattr(hub, "_ask", lambda: asked.append(1) or ask())
    return asked


def test_every_way_to_the_hub_answers_quickly_with_the_reason(unreachable: list[int], tmp_path: Path) -> None:
    start = time.monotonic()
    registry = core_registry()
    with pytest.raises(TargetError, match="Hub cannot be reached") as target:
        open_adapter("organisation/model", registry=registry)
    assert "no local copy" in str(target.value)
    with pytest.raises(TargetError):
        tokenizer_for("organisation/model")
    with pytest.raises(CheckpointError, match="Hub cannot be reached"):
        resolve_draft("organisation/draft", base=tmp_path)
    source = SourceOptions(path="organisation/prompts")
    with pytest.raises(DataError, match="Hub cannot be reached"):
        list(read_sources([source], split="train", held_out=0.0, seed=0, base=tmp_path, registry=registry))
    assert time.monotonic() - start < 5 * hub.ANSWER_WITHIN_SECONDS
    assert len(unreachable) == 1


def test_a_hub_that_never_answers_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def get(self, *_: object, **__: object) -> None:
            time.sleep(2)

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(hub, "ANSWER_WITHIN_SECONDS", 0.05)
    assert "no answer within" in (hub.why_unreachable() or "")
    assert constants.HF_HUB_OFFLINE


def _answers(monkeypatch: pytest.MonkeyPatch, *, status: int, kind: str = "application/json", **more: str) -> None:
    class Session:
        def get(self, url: str, **_: object) -> SimpleNamespace:
            headers = {"content-type": kind} | ({"location": more["location"]} if "location" in more else {})
            return SimpleNamespace(status_code=status, headers=headers, url=more.get("url", url))

    monkeypatch.setattr("huggingface_hub.get_session", Session)


@pytest.mark.parametrize("status", [200, 401, 403, 404])
def test_a_hub_s_answer_is_asked_for_again_after_a_while(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    hub._switch(offline=True)
    _answers(monkeypatch, status=status)
    assert hub.why_unreachable() is None
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": 503, "kind": "text/html"}, "answers 503"),
        ({"status": 429}, "answers 429"),
        ({"status": 407}, "answers 407"),
        ({"status": 200, "kind": "text/html"}, "want a login"),
        ({"status": 302, "location": "http://login.example/"}, "sends to login.example"),
        ({"status": 200, "url": "http://login.example/"}, "sends to login.example"),
    ],
)
def test_an_answer_that_is_no_working_hub_s(monkeypatch: pytest.MonkeyPatch, answer: Any, says: str) -> None:
    _answers(monkeypatch, **answer)
    assert says in (hub.why_unreachable() or "")
    assert constants.HF_HUB_OFFLINE


def test_offline_mode_of_the_user_s_own_is_kept(monkeypatch: pytest.MonkeyPatch, unreachable: list[int]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in (hub.why_unreachable() or "")
    assert unreachable == []
