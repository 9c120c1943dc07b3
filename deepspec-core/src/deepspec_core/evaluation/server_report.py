"""What a report says about a server's results: whether others used the server, and how its answers compare with ours.

This file knows metrics.json. The tables that all reports share are in report.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from deepspec_core.evaluation.markdown_table import markdown_table

_MOST_DIFFERING: Final = 50


def of_server(result: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about one result. Empty if the result is not a server's."""
    counted = result.get("counted")
    if counted is None:
        return
    if counted["disturbed"]:
        yield (
            f"the server counted {counted['tokens_by_counters']:,} generated tokens and answered with "
            f"{counted['tokens_in_answers']:,}: somebody else asked it too, so its rounds are left out."
        )
    elif not counted["speculates"]:
        yield "the server counted no round of speculative decoding."
    if counted["disturbed"] is None:
        yield "the server shows no counters, so other work that it did meanwhile is not noticed."
    if counted["full_proposals"] is False:
        yield "some proposals were shorter than others, so later positions were proposed in fewer rounds."
    if beside_rounds := counted.get("tokens_beside_rounds"):
        yield (
            f"at least {beside_rounds:,} tokens of the answers came in steps that the server counts as no rounds, as "
            "those without a proposal: the accepted length is of the rounds it counted, and not of all its steps."
        )
    if counted["mismatched_answers"]:
        yield f"{counted['mismatched_answers']} answers came as text whose tokens are not those the server counted."
    beside = result.get("against")
    if beside is not None:
        yield f"{beside['equal']} of {beside['compared']} outputs equal those of this engine ({beside['run']})."
        if beside["acceptance_length"] is not None and result["acceptance_length"] is not None:
            yield f"accepted length {result['acceptance_length']:.3f} there, {beside['acceptance_length']:.3f} here."
            yield (
                f"{counted['kept_per_round']:.3f} tokens of the answers a round there, {beside['kept_per_round']:.3f} "
                "here. A server may count tokens after an answer's end as accepted; these are without them."
            )


def server_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a Markdown page that only a server's results have."""
    pairs = [(result, result["against"]) for result in report["results"] if result.get("against")]
    figures = [
        (result, beside)
        for result, beside in pairs
        if beside["by_position"] is not None and result["marginal"] is not None
    ]
    if figures:
        yield from ("", "## Acceptance by position, % of all rounds", "")
        rows = []
        for result, beside in figures:
            for name, length, shares in (
                (report["server"]["engine"], result["acceptance_length"], result["marginal"]),
                ("this engine", beside["acceptance_length"], beside["by_position"]),
            ):
                said = " ".join(f"{100 * share:.1f}" for share in shares)
                rows.append([result["task"], str(result["batch_size"]), name, f"{length:.3f}", said])
        yield from markdown_table(("task", "batch", "by", "accepted length", "positions"), rows)
    differing = [(result, one) for result, beside in pairs for one in beside["differing"]]
    if differing:
        yield from ("", "## Outputs that differ from this engine's", "")
        rows = []
        for result, one in differing[:_MOST_DIFFERING]:
            cells = [result["task"], result["batch_size"], one["id"], one["position"], one["ours"], one["theirs"]]
            rows.append(["-" if cell is None else str(cell) for cell in cells])
        if len(differing) > _MOST_DIFFERING:
            rows.append([f"and {len(differing) - _MOST_DIFFERING} more, in metrics.json", *[""] * 5])
        yield from markdown_table(("task", "batch", "prompt", "parts at token", "here", "there"), rows)
