"""Decoding prompts with or without a draft, from Python.

Knows what a prompt may look like and what comes back; how rounds work is decoding/engine.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Clock, Committed, Request, Round, decode
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.interface.models import Draft, Target

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@frozen(kw_only=True)
class Generation:
    """One continued prompt. `ids` are the new tokens, a stop token included; `text` is what they say, without it.

    `finish_reason` is "stop" or "length". `rounds` has one entry a round of proposal and verification: tokens proposed,
    draft tokens accepted, tokens committed. Without a draft a round commits one token.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str
    rounds: tuple[Round, ...]

    @property
    def accepted_length(self) -> float:
        """Tokens a round commits on average, the target's own included; 0 where there was no round."""
        return sum(r.acceptance_length for r in self.rounds) / len(self.rounds) if self.rounds else 0.0


def generate(
    target: Target,
    draft: Draft | None,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    thinking: bool = False,
    system_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    confidence_threshold: float = 0.0,
    on_round: Callable[[Committed], None] | None = None,
    clock: Clock | None = None,
) -> list[Generation]:
    """Continue every prompt; the results are in the order of the prompts.

    A prompt is a text (one user turn), a list of messages with `role` and `content`, or a list of token ids, which are
    taken as they are. Texts and messages go through the target's chat template. With a draft the output is the same as
    without: at temperature 0 token for token, above it in distribution. Prompt i draws from `seed` + i, whatever stands
    beside it in the batch.

    `on_round` is told, as decoding goes on, which tokens were committed. `clock`, where given, adds up the seconds of
    prefill, draft and verification. Raises DeepSpecError for options out of range and for prompts that cannot be
    rendered or leave no room to answer.
    """
    _check(max_new_tokens, temperature, seed, batch_size, confidence_threshold)
    if draft is not None and confidence_threshold > 0 and draft.description.gives_confidence is False:
        raise ConfigError(
            "this draft gives no confidence to compare with",
            where="confidence_threshold",
            found=f"{confidence_threshold:g}",
            expected="a draft with a confidence head, or 0",
        )
    tokenizer = ChatTokenizer(target.tokenizer, thinking=thinking)
    requests = [
        Request(
            id=str(index), prompt_ids=_prompt_ids(tokenizer, prompt, system_prompt, index, target), seed=seed + index
        )
        for index, prompt in enumerate(_listed(prompts))
    ]
    if not requests:
        return []
    room = target.architecture.max_positions
    longest = max(len(request.prompt_ids) for request in requests)
    found = {
        done.id: done
        for done in decode(
            target.model,
            None if draft is None else draft.model.proposer(),
            requests,
            sampling=Sampling(temperature=temperature),
            stop_ids=target.architecture.stop_token_ids,
            max_new_tokens=max_new_tokens,
            batch_size=min(batch_size, len(requests)),
            max_length=min(room, longest + max_new_tokens),
            confidence_threshold=confidence_threshold,
            on_round=on_round,
            clock=clock,
        )
    }
    return [
        Generation(
            prompt_ids=done.prompt_ids,
            ids=done.output_ids,
            text=tokenizer.decode(done.output_ids, skip_special_tokens=True),
            finish_reason=done.finish_reason,
            rounds=done.rounds,
        )
        for done in (found[request.id] for request in requests)
    ]


def _check(max_new_tokens: int, temperature: float, seed: int, batch_size: int, confidence_threshold: float) -> None:
    limits = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "1 or more"),
        "temperature": (temperature, 0.0 <= temperature < float("inf"), "0 or more"),
        "seed": (seed, seed >= 0, "0 or more"),
        "batch_size": (batch_size, batch_size >= 1, "1 or more"),
        "confidence_threshold": (confidence_threshold, 0.0 <= confidence_threshold <= 1.0, "between 0 and 1"),
    }
    for name, (value, fits, expected) in limits.items():
        if not fits:
            raise ConfigError("an option of generation is out of range", where=name, found=value, expected=expected)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt alone is a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int | Mapping):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _prompt_ids(
    tokenizer: ChatTokenizer, prompt: Prompt, system_prompt: str | None, index: int, target: Target
) -> tuple[int, ...]:
    where = f"prompt {index}"
    vocabulary, room = target.architecture.vocab_size, target.architecture.max_positions
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif hasattr(prompt, "tolist"):  # ids as an array or a tensor
        prompt = prompt.tolist()
    if len(prompt) == 0 or (isinstance(prompt[0], Mapping) and not prompt[-1].get("content")):  # type: ignore[union-attr]
        raise DataError("a prompt is empty", where=where, expected="text, messages that end with text, or token ids")
    if isinstance(prompt[0], int):
        ids = tuple(int(token) for token in prompt)  # type: ignore[arg-type]
        outside = [token for token in ids if not 0 <= token < vocabulary]
        if outside:
            raise DataError(
                "a prompt has ids outside the vocabulary",
                where=where,
                found=outside[0],
                expected=f"0 to {vocabulary - 1}",
            )
    else:
        messages = _messages(prompt, where)
        ids = tokenizer.render_prompt(messages, system_prompt)
    if len(ids) >= room:
        raise DataError(
            "a prompt leaves the target no room to answer",
            where=where,
            found=f"{len(ids):,} tokens",
            expected=f"fewer than {room:,}",
        )
    return ids


def _messages(prompt: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(
                "a message has no role", where=where, found=message, expected='{"role": ..., "content": ...}'
            )
    if prompt[-1]["role"] == "assistant":
        raise DataError(
            "a prompt ends with the assistant's message", where=where, expected="a user's message at the end"
        )
    return tuple(prompt)
