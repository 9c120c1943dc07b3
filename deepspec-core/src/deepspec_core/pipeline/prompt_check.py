"""Checks, before the first stage, settings that concern all prompts and answers: chat template, lengths, mask token.

Knows the run file and the target's tokenizer. Reads no conversation. checking.py calls each check for the stages that
need it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from deepspec_core.config.schema import MASK
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.pipeline.run import Run

if TYPE_CHECKING:
    from deepspec_core.contracts.draft import DraftDescription

log = logging.getLogger("deepspec")


def prompt_length(run: Run, system_prompt: str | None) -> int:
    """How many tokens the shortest prompt has. Raises ConfigError if the chat template refuses it, or leaves it out.

    So it would do with every conversation.
    """
    try:
        return len(run.target.tokenizer.render_prompt(({"role": "user", "content": "?"},), system_prompt))
    except DataError as error:
        key = "target.chat_template" if run.file.target.chat_template is not None else "target.model"
        raise ConfigError(
            error.problem,
            where=f"{run.path}: {key if system_prompt is None else 'data.system_prompt'}",
            found=error.found,
            expected=error.expected or "a template whose output contains the whole prompt",
            fix="Name another template in target.chat_template."
            if system_prompt is None
            else "Change data.system_prompt, or name another template in target.chat_template.",
        ) from error


def check_thinking(run: Run) -> None:
    """ConfigError for a thinking mode that the chat template does not know: both modes would be the same prompts."""
    asked = run.file.regenerate.thinking
    if run.target.tokenizer.can_ask(asked, run.target.adapter.conversation_format()):
        return
    raise ConfigError(
        "the chat template has no thinking mode: prompts are the same with and without it",
        where=f"{run.path}: regenerate.thinking",
        found=str(asked).lower(),
        expected="false, or a template that reads `enable_thinking`",
        fix="Leave it out, or name another template in target.chat_template.",
    )


def check_room_for_answers(run: Run) -> None:
    """Raise ConfigError if the shortest prompt and the fewest supervised tokens are longer than any sample may be."""
    data, most = run.file.data, run.data.max_length
    prompt = prompt_length(run, data.system_prompt)
    if prompt + data.min_supervised_tokens > most:
        bare = prompt_length(run, None)
        if data.min_supervised_tokens >= most:
            key, fix = "min_supervised_tokens", "Raise data.max_length, or lower data.min_supervised_tokens."
        elif data.system_prompt is not None and bare + data.min_supervised_tokens <= most:
            key, fix = "system_prompt", "Raise data.max_length, or shorten data.system_prompt."
        else:
            key, fix = "max_length", "Raise data.max_length."
        raise ConfigError(
            "every sample would be dropped as too short: prompt and supervised tokens exceed data.max_length",
            where=f"{run.path}: data.{key}",
            found=f"{prompt} tokens before an answer, and {data.min_supervised_tokens} supervised at least",
            expected=f"at most {most:,} together, the tokens of the longest sample",
            fix=fix,
        )


def check_answers_reach(run: Run, turns: int | None) -> None:
    """Raise ConfigError if no conversation can have enough supervised tokens to be kept, however long its answers are.

    `turns` is the most of any conversation. Where it is not known, an answer that is too short alone is a warning.
    """
    longest, least = run.file.regenerate.max_tokens, run.file.data.min_supervised_tokens
    if longest * (turns or 1) >= least:
        return
    if turns is None:
        log.warning(
            "conversations of one turn will be dropped: regenerate.max_tokens = %d, data.min_supervised_tokens = %d",
            longest,
            least,
        )
        return
    raise ConfigError(
        "every answer of the target would be dropped as too short",
        where=f"{run.path}: regenerate.max_tokens",
        found=f"{longest}, of {turns} turns at most, with data.min_supervised_tokens = {least}",
        expected=f"at least {-(-least // turns)}",
        fix="Raise regenerate.max_tokens, or lower data.min_supervised_tokens.",
    )


def check_mask_token(run: Run, description: DraftDescription) -> None:
    """Raise ConfigError for a mask token that means something to the target: the draft would read it as that."""
    mask = description.config.get(MASK)
    if mask is None:
        return
    architecture, tokenizer = run.target.architecture, run.target.tokenizer
    used = dict.fromkeys(tokenizer.control_token_ids(), "a control token of the chat template")
    used |= dict.fromkeys(architecture.stop_token_ids, "a stop token")
    used.setdefault(architecture.pad_token_id, "the padding token")
    if mask in used:
        raise ConfigError(
            "the mask token occurs in the target's texts",
            where=f"{run.path}: [draft] {MASK}",
            found=f"{mask} ({tokenizer.decode([mask])!r}), {used[mask]}",
            expected="a token id that no text of the target uses",
            fix="Choose an unused or reserved id of the target's vocabulary.",
        )
