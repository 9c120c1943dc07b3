"""What tests of shared work need: workers as threads, ends of several kinds, and quick signs of life."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore

from deepspec_core import crew as crews
from deepspec_core.crew import Crew
from deepspec_core.testing.tiny_target import TinyTarget

# Workers of the run that is broken off, and of the one that goes on.
COUNTS = pytest.mark.parametrize(
    "counts", [(3, 2), pytest.param((2, 1), marks=pytest.mark.slow), pytest.param((1, 3), marks=pytest.mark.slow)]
)


class Killed(BaseException):
    """Stands for a kill: nobody is told, and nothing takes it for a failure."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_BEAT_SECONDS": 0.02, "_POLL_SECONDS": 0.01, "SILENCE_SECONDS": 0.5}.items():
        monkeypatch.setattr(crews, name, seconds)


def together(count: int, work: Callable[[Crew], Any]) -> list[Any]:
    """What the work returns, or the error that ends it, of each of so many workers."""
    store = HashStore()
    ends: list[Any] = [None] * count

    def worker(rank: int) -> None:
        crew = Crew(rank=rank, count=count, store=store if count > 1 else None)
        watch = crew.watch(store) if count > 1 else None
        try:
            ends[rank] = work(crew)
        except (Exception, Killed) as error:
            ends[rank] = error
            if not isinstance(error, Killed):
                crew.fail(error)
        if watch is not None:
            watch.end()

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a worker hangs"
    return ends


class Dying(TinyTarget):
    """A target whose process ends after some steps."""

    steps = -1
    how: type[BaseException] = Killed

    def decode(self, *arguments: Any, **options: Any) -> Any:
        self.steps -= 1
        if self.steps == 0:
            raise self.how("out of memory")
        return super().decode(*arguments, **options)
