"""Whether evaluation asks in the words that training read: token ids of prompts, and how they differ.

Knows token ids and renderings of one chat template. Does not know where conversations come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.diagnosis.finding import HELD_OUT, PROMPTS, Finding

SAME, THINKING, REPEATED, GENERATION, TEMPLATE = (
    "same",
    "thinking mode",
    "repeated BOS",
    "generation prompt",
    "template",
)

_FIXES = {
    THINKING: "Set regenerate.thinking to what the training data was made with.",
    REPEATED: "Let the chat template or the tokenizer add the token, not both.",
    GENERATION: "Set target.chat_template to the template that training read.",
    TEMPLATE: "Set target.chat_template and data.system_prompt to those that training read.",
}


@frozen(kw_only=True)
class PromptDifference:
    """How one prompt of evaluation differs from what training read of the same conversation, with the evidence."""

    sample: str
    kind: str
    says: str = ""


def compare_prompt(
    sample: str, trained: Sequence[int], asked: Sequence[int], other_mode: Sequence[int], tokenizer: ChatTokenizer
) -> PromptDifference:
    """`trained` are the ids of a training sample, answer included; `asked` is evaluation's prompt of its first turn.

    `other_mode` is the prompt with thinking the other way round. The prompt is the same if the sample begins with it.
    """
    trained, asked, other_mode = list(trained), list(asked), list(other_mode)
    if _begins(trained, asked):
        return PromptDifference(sample=sample, kind=SAME)
    if asked != other_mode and _begins(trained, other_mode):
        way = "with" if tokenizer.thinking else "without"
        says = f"Evaluation asks {way} thinking, and training samples go on as those asked the other way do."
        return PromptDifference(sample=sample, kind=THINKING, says=says)
    repeats = (_leading(trained), _leading(asked))
    if repeats[0] != repeats[1] and _begins(trained[repeats[0] - 1 :], asked[repeats[1] - 1 :]):
        says = (
            f"Evaluation's prompts begin with {tokenizer.decode(asked[:1])!r} {_times(repeats[1])}, training samples "
            f"{_times(repeats[0])}."
        )
        return PromptDifference(sample=sample, kind=REPEATED, says=says)
    at = next(
        (index for index, pair in enumerate(zip(trained, asked, strict=False)) if pair[0] != pair[1]),
        min(len(trained), len(asked)),
    )
    around = slice(max(0, at - 2), at + 6)
    says = (
        f"They part at token {at} of {len(asked)}: evaluation asks {tokenizer.decode(asked[around])!r} where training "
        f"read {tokenizer.decode(trained[around])!r}."
    )
    return PromptDifference(sample=sample, kind=TEMPLATE, says=says)


def missing_generation_prompt(
    sample: str,
    trained: Sequence[int],
    supervised_from: int,
    asked: Sequence[int],
    start: str,
    tokenizer: ChatTokenizer,
) -> PromptDifference | None:
    """Evaluation's prompt, which training read, ends before the assistant's header `start`; None if it does not."""
    between = tokenizer.decode(list(trained)[len(asked) : supervised_from])
    if start.strip() and start.strip() in between:
        says = f"Evaluation's prompts end before {between!r}, which training samples have before the answer."
        return PromptDifference(sample=sample, kind=GENERATION, says=says)
    return None


def prompts_finding(found: Sequence[PromptDifference]) -> Finding | None:
    """What most of the differing prompts have in common; None if all are the same."""
    different = [one for one in found if one.kind != SAME]
    if not different:
        return None
    kinds = [one.kind for one in different]
    kind = max(sorted(set(kinds)), key=kinds.count)
    first = next(one for one in different if one.kind == kind)
    return Finding(
        name=f"prompts: {kind}",
        says=f"{kinds.count(kind)} of {len(found)} prompts are rendered differently from training. {first.says}",
        fix=_FIXES[kind],
        explains=(HELD_OUT, PROMPTS),
    )


def _begins(text: Sequence[int], start: Sequence[int]) -> bool:
    return list(text[: len(start)]) == list(start)


def _leading(ids: Sequence[int]) -> int:
    """How often the first token stands at the beginning."""
    return next((index for index, token in enumerate(ids) if token != ids[0]), len(ids))


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")
