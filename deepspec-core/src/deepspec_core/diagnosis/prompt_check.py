"""Checks whether evaluation renders prompts as training did: compares their token ids, and says how they differ.

This file knows token ids and renderings of one chat template. It does not know where conversations come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.diagnosis.finding import HELD_OUT, PROMPTS, Finding

SAME, THINKING, GENERATION, TEMPLATE = "same", "thinking mode", "generation prompt", "template"
BEGINNING = "tokens at the beginning"

_FIXES = {
    THINKING: "Set regenerate.thinking to what the training data was made with.",
    BEGINNING: "Let the chat template or the tokenizer add the first token (BOS), alike in training and evaluation.",
    GENERATION: "Set target.chat_template to the template that training read.",
    TEMPLATE: "Set target.chat_template and data.system_prompt to those that training read.",
}


@frozen(kw_only=True)
class PromptDifference:
    """How one prompt of evaluation differs from the same conversation's tokens in training, with the evidence."""

    sample: str
    kind: str
    says: str = ""


@frozen(kw_only=True)
class Trained:
    """The token ids of a training sample, with its answer. The first `prompt` tokens are not supervised."""

    sample: str
    ids: Sequence[int]
    prompt: int


def compare_prompt(
    trained: Trained, asked: Sequence[int], other_mode: Sequence[int], tokenizer: ChatTokenizer, *, header: str
) -> PromptDifference:
    """Compare evaluation's prompt of the sample's first turn, `asked`, with the sample.

    `other_mode` is the same prompt with thinking switched the other way. The prompt is the same as training's if the
    sample begins with it, and if neither the assistant's `header` nor the end of `other_mode` stands between the prompt
    and the answer.
    """
    sample, ids, asked, other_mode = trained.sample, list(trained.ids), list(asked), list(other_mode)
    between = tokenizer.decode(ids[len(asked) : trained.prompt])
    other_fits = asked != other_mode and _begins(ids[: trained.prompt], other_mode)
    if _begins(ids, asked) and not (other_fits and len(other_mode) > len(asked)):
        if header.strip() not in between:
            return PromptDifference(sample=sample, kind=SAME)
        says = f"Evaluation's prompts end before {between!r}, which training samples have before the answer."
        return PromptDifference(sample=sample, kind=GENERATION, says=says)
    if other_fits:
        way = "with" if tokenizer.thinking else "without"
        says = f"Evaluation asks {way} thinking, and training samples were asked the other way."
        return PromptDifference(sample=sample, kind=THINKING, says=says)
    extra = next((count for count in (1, 2) if _begins(ids, asked[count:])), None)
    missing = next((count for count in (1, 2) if _begins(ids[count:], asked)), None)
    if extra is not None or missing is not None:
        more, first = ("Evaluation's prompts", asked[:extra]) if extra else ("Training samples", ids[:missing])
        says = f"{more} have {tokenizer.decode(first)!r} more at their beginning."
        return PromptDifference(sample=sample, kind=BEGINNING, says=says)
    at = next(
        (index for index, pair in enumerate(zip(ids, asked, strict=False)) if pair[0] != pair[1]),
        min(len(ids), len(asked)),
    )
    around = slice(max(0, at - 2), at + 12)
    says = (
        f"They part at token {at} of {len(asked)}: evaluation asks {tokenizer.decode(asked[around])!r} where training "
        f"read {tokenizer.decode(ids[around])!r}."
    )
    return PromptDifference(sample=sample, kind=TEMPLATE, says=says)


def prompts_finding(found: Sequence[PromptDifference]) -> Finding | None:
    """The finding about what most differing prompts have in common. None if fewer than half of the prompts differ.

    A few prompts may differ without a fault: a sample without thoughts looks like one that was asked without thinking.
    """
    different = [one for one in found if one.kind != SAME]
    if 2 * len(different) < len(found) or not different:
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
