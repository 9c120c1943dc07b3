"""How servers are asked to complete a prompt: two dialects of one protocol.

All sampling settings are sent, also those that are off, because a server takes missing settings from the model's
generation_config.json. Knows the bodies of requests; does not know how they are sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from attrs import field, frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.servers.connection import Refusal
from deepspec_core.servers.wanted import Wanted

# What torch.manual_seed, NumPy and every server take.
_SEEDS = 2**31


class Dialect(Protocol):
    """Bodies of requests, and where they go."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def lists_what_it_serves(self) -> bool:
        """Whether /models lists only the models that are served, and not others that could be loaded."""
        ...

    @property
    def path(self) -> str:
        """Where requests go, from the server's root."""
        ...

    def body(self, wanted: Wanted, *, model: str, prompt_ids: tuple[int, ...], limit: int, seed: int) -> dict[str, Any]:
        """A request. Refusal where the prompt cannot be said."""
        ...

    def in_form(self, content: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """An answer to this body as OpenAI's completions are: `choices` and `usage`. Fault where it is none."""
        ...

    def impossible(self, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
        """Settings and what replaces them in a body so that no server that reads them can take it."""
        ...


@frozen
class TokenIds:
    """vLLM and SGLang: the prompt as token ids, sampling in the body; the answer's ids come back where it knows how.

    `more` stands in every body.
    """

    more: Mapping[str, Any] = field(factory=dict)
    name: str = "token ids"
    lists_what_it_serves: bool = True
    path: str = "/v1/completions"

    def in_form(self, content: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return content

    def body(self, wanted: Wanted, *, model: str, prompt_ids: tuple[int, ...], limit: int, seed: int) -> dict[str, Any]:
        """A request."""
        sampling = wanted.sampling
        return {
            "model": model,
            "prompt": list(prompt_ids),
            "max_tokens": limit,
            "seed": seed % _SEEDS,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,  # off, to both
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(wanted.stop_ids),
            "skip_special_tokens": False,
            "return_token_ids": True,
            **self.more,
        }

    def impossible(self, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each sampling setting that decides what is drawn, below anything it may be."""
        yield "temperature", {"temperature": -7.0}
        yield "repetition_penalty", {"repetition_penalty": -7.0}
        if wanted.sampling.temperature > 0:
            yield "top_p", {"top_p": -7.0}
            yield "top_k", {"top_k": -7}
            yield "min_p", {"min_p": -7.0}


@frozen
class GenerationConfigText:
    """`transformers serve`: the prompt as text, all of sampling in a JSON text; it answers with text."""

    name: str = "text and generation_config"
    lists_what_it_serves: bool = False
    path: str = "/v1/completions"

    def in_form(self, content: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return content

    def body(self, wanted: Wanted, *, model: str, prompt_ids: tuple[int, ...], limit: int, seed: int) -> dict[str, Any]:
        """A request. Refusal where no text becomes these ids."""
        sampling = wanted.sampling
        config = {**_sampling(sampling), "max_new_tokens": limit, "repetition_penalty": sampling.repetition_penalty}
        config |= {"eos_token_id": list(wanted.stop_ids), "pad_token_id": wanted.end_id}
        return {
            "model": model,
            "prompt": text_of(wanted.tokenizer, prompt_ids),
            "seed": seed % _SEEDS,
            "generation_config": json.dumps(config),
        }

    def impossible(self, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
        """The text that holds them all, damaged."""
        yield "generation_config", {"generation_config": "{"}


def _sampling(sampling: Sampling) -> dict[str, Any]:
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
    }


def text_of(tokenizer: ChatTokenizer, prompt_ids: tuple[int, ...]) -> str:
    """The text that a server's tokenizer reads as these ids; Refusal where there is none.

    Servers put the tokenizer's own first token before a text, which a rendered prompt already begins with.
    """
    text = tokenizer.decode(prompt_ids)
    first = tokenizer.tokenizer.bos_token
    for candidate in (text, text.removeprefix(first) if first else text):
        if tuple(tokenizer.tokenizer(candidate, verbose=False)["input_ids"]) == prompt_ids:
            return candidate
    raise Refusal("no text becomes the token ids of this prompt, and the server takes text alone")
