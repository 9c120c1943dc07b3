"""How many requests a server is given at once: what raises its rate, and no more."""

import pytest

from deepspec_core.servers.level import START, Level


def _served(level: Level, at_once: int, answers: int, now: float = 0.0) -> float:
    """So many answers by a server that works on `at_once` requests at a time, each in a second. The time then."""
    for _ in range(answers):
        now += 1 / min(level.value, at_once)
        level.answered(100, now)
    return now


@pytest.mark.parametrize(("at_once", "settles"), [(1, START), (24, 32), (64, 64), (10_000, 512)])
def test_the_level_is_what_the_server_gains_by(at_once: int, settles: int) -> None:
    level = Level(most=512)
    now = _served(level, at_once, 8_000)
    assert level.value in (settles, settles * 2)  # a settled level is tried again from time to time
    values = []
    for _ in range(20_000):
        now = _served(level, at_once, 1, now)
        values.append(level.value)
    assert sorted(values)[len(values) // 2] == settles
    assert max(values) <= 512


def test_a_busy_server_gets_half_and_a_limit_is_kept() -> None:
    level = Level(most=6)
    _served(level, 100, 500)
    assert level.value == 6
    level.busy()
    assert level.value == 3
    for _ in range(5):
        level.busy()
    assert level.value == 1
    assert Level(most=2).value == 2
