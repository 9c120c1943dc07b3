"""The model card keeps its tables, whatever files and tasks are called."""

from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.contracts.export import ExportFacts, TargetName
from deepspec_export.card import card


def test_names_with_bars_and_line_ends_stay_in_their_cells() -> None:
    result = {
        "task": "a|b\nc",
        "temperature": 0.0,
        "samples": 3,
        "acceptance_length": 2.5,
        "acceptance_length_interval": [2.0, 3.0],
    }
    facts = ExportFacts(
        description=DraftDescription(
            algorithm="dflash",
            class_name="Draft",
            taps=(1,),
            max_tokens=4,
            num_layers=1,
            anchor_predicts=True,
            causal=False,
            weight_names={},
            config={},
        ),
        config={},
        shapes={},
        softcap=None,
        target=TargetName(name="odd|target", local=True),
        settings={"data": {"sources": [{"path": "rows|1`.jsonl", "limit": 5}], "held_out": 0.1}},
        results=[result, {**result, "acceptance_length": None, "acceptance_length_interval": None}],
    )
    text = card(facts, format_name="vllm", commands=["serve it"], notes=[])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") - 1 for line in rows]
    assert widths == [4] * 4 + [2] * (len(rows) - 4)
    assert "| a\\|b c | 0 | 3 | 2.50 (2.00-3.00) |" in rows
    assert "| a\\|b c | 0 | 3 | - |" in rows, "no answer had a round"
    assert "| data | rows\\|1'.jsonl (at most 5 conversations) |" in rows
