"""The tasks that --task means: `all` leaves out what is named beside it, and nothing else."""

import pytest

from deepspec_core.cli.asked_tasks import tasks_meant
from deepspec_core.errors import DataError
from deepspec_core.pipeline.evaluating import journals

REGISTERED = ("gsm8k", "math500")


def test_all_leaves_out_what_is_named_beside_it() -> None:
    assert tasks_meant(("all",), REGISTERED) == REGISTERED
    assert tasks_meant(("all", "math500"), REGISTERED) == ("math500", "gsm8k")
    assert tasks_meant(("gsm8k:rows.jsonl", "all"), REGISTERED) == ("gsm8k:rows.jsonl", "math500")
    assert tasks_meant(("math500",), REGISTERED) == ("math500",)


def test_a_file_of_the_same_name_is_another_task() -> None:
    meant = tasks_meant(("all", "mine/gsm8k.jsonl"), REGISTERED)
    assert meant == ("mine/gsm8k.jsonl", "gsm8k", "math500")
    with pytest.raises(DataError, match=r"(?s)Two tasks would write the same file.*mine/gsm8k.jsonl, gsm8k"):
        journals(meant)
