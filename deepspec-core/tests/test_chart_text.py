"""Names in charts stay text, in any script, and nothing is said about matplotlib's own fonts."""

import warnings

import pytest

from deepspec_core.reporting.svg import drawing

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("names", [False, True])
def test_a_name_in_another_script_is_text_and_no_warning(names: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drawing(width=3, height=2, x="中文任务.jsonl", names=names) as drawn:
            drawn.axes.barh(["中文任务", "other"], [1, 2])
            svg = drawn.svg()
    assert ">中文任务.jsonl</text>" in svg
    assert ">中文任务</text>" in svg
