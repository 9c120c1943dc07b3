"""What this package offers: nine evaluation tasks. Imports core's records only."""

from __future__ import annotations

from collections.abc import Iterable

from deepspec_core.plugins import TaskSpec, hookimpl

_QUOTA, _QUOTAS = 500, {"mbpp": 256}
_TASKS = {
    "gsm8k": "1,319 word problems of school mathematics",
    "math500": "500 problems of competition mathematics",
    "aime25": "the 30 problems of the AIME of 2025",
    "humaneval": "164 Python functions to complete",
    "mbpp": "257 small Python programs to write",
    "livecodebench": "1,055 problems of programming contests",
    "mt-bench": "80 open questions, each with a second turn",
    "alpaca": "52,002 instructions",
    "arena-hard-v2": "750 hard questions of users",
}


@hookimpl
def deepspec_tasks() -> Iterable[TaskSpec]:
    """The tasks."""
    modules = {name: name.replace("-", "_") for name in _TASKS}
    return [
        TaskSpec(
            name=name,
            summary=summary,
            build=f"deepspec_tasks.published:{modules[name]}",
            from_row=f"deepspec_tasks.published:{modules[name]}.from_row",
            quota=_QUOTAS.get(name, _QUOTA),
        )
        for name, summary in _TASKS.items()
    ]
