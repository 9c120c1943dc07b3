"""The engines whose speculative decoding can be measured (vLLM, llama.cpp, SGLang), and all differences between them.

vLLM and llama.cpp count rounds for the whole server, at /metrics. SGLang reports the rounds of each answer in the
answer. Written for vLLM 0.32, llama.cpp 11434 and SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from attrs import frozen

from deepspec_core.servers.connection import Fault, Kind, shown
from deepspec_core.servers.counting import Names, Tally
from deepspec_core.servers.dialects import Dialect, TokenIds
from deepspec_core.servers.wanted import Wanted

_SEEDS: Final = 2**31
_TOKEN_IDS: Final = TokenIds()
_VLLM: Final = Names(
    generated="vllm:generation_tokens_total",
    running=("vllm:num_requests_running", "vllm:num_requests_waiting"),
    speculation=(
        "vllm:spec_decode_num_drafts_total",
        "vllm:spec_decode_num_draft_tokens_total",
        "vllm:spec_decode_num_accepted_tokens_total",
    ),
    accepted_at="vllm:spec_decode_num_accepted_tokens_per_pos_total",
)
_LLAMA_CPP: Final = Names(
    generated="llamacpp:tokens_predicted_total",
    running=("llamacpp:requests_processing", "llamacpp:requests_deferred"),
    speculation=(
        "llamacpp:spec_decode_num_drafts_total",
        "llamacpp:spec_decode_num_draft_tokens_total",
        "llamacpp:spec_decode_num_accepted_tokens_total",
    ),
    accepted_at="llamacpp:spec_decode_num_accepted_tokens_per_pos_total",
)
_SGLANG: Final = Names(
    generated="sglang:generation_tokens_total", running=("sglang:num_running_reqs", "sglang:num_queue_reqs")
)


class Engine(Protocol):
    """One engine."""

    @property
    def name(self) -> str:
        """How messages and reports call it."""
        ...

    @property
    def owner(self) -> str:
        """What its list of models says in `owned_by`."""
        ...

    @property
    def dialect(self) -> Dialect:
        """How it is asked."""
        ...

    @property
    def counters(self) -> Names:
        """Its counters at /metrics."""
        ...

    @property
    def shows_counters(self) -> str:
        """What makes it show them."""
        ...

    @property
    def tells_in_answers(self) -> bool:
        """Whether answers tell their rounds. If not, /metrics is all there is."""
        ...

    def tally(self, content: dict[str, Any]) -> Tally | None:
        """What an answer, as it came, says of its rounds; None where it says nothing."""
        ...


@frozen(kw_only=True)
class Counting:
    """An engine that counts rounds at /metrics, and says nothing of them in its answers."""

    name: str
    owner: str
    dialect: Dialect
    counters: Names
    shows_counters: str
    tells_in_answers: bool = False

    def tally(self, content: dict[str, Any]) -> Tally | None:
        """Nothing."""
        return None


@frozen
class _LlamaCppIds:
    """llama.cpp's own completions: prompt and answer as token ids."""

    name: str = "llama.cpp's completions"
    lists_what_it_serves: bool = True
    path: str = "/completion"

    def body(self, wanted: Wanted, *, model: str, prompt_ids: tuple[int, ...], limit: int, seed: int) -> dict[str, Any]:
        """A request. What it may reuse of earlier prompts is computed anew."""
        sampling = wanted.sampling
        penalties = ["penalties"] if sampling.repetition_penalty != 1 else []
        return {
            "prompt": list(prompt_ids),
            "n_predict": limit,
            "seed": seed % _SEEDS,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "samplers": [*penalties, "temperature", "top_k", "top_p", "min_p"],
            "repeat_penalty": sampling.repetition_penalty,
            # The prompt and the answer. Newer builds refuse -1, which said so.
            "repeat_last_n": len(prompt_ids) + limit,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
        }

    def impossible(self, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
        """None: it bends what cannot be, and says in each answer what it took."""
        yield from ()

    def in_form(self, content: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Its `tokens` and counts. Fault where it sampled otherwise than it was asked."""
        took = content.get("generation_settings")
        for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty"):
            value = took.get(name) if isinstance(took, dict) else None
            # It keeps settings in single precision.
            if type(value) in (int, float) and abs(value - body[name]) > 1e-6 * max(1.0, abs(body[name])):
                raise Fault(Kind.WRONG, f"it sampled with {name} = {value}, where {body[name]} was asked")
        reason = {"eos": "stop", "word": "stop", "limit": "length"}.get(str(content.get("stop_type")))
        choice = {"text": content.get("content"), "finish_reason": reason, "token_ids": content.get("tokens")}
        usage = {
            "prompt_tokens": content.get("tokens_evaluated"),
            "completion_tokens": content.get("tokens_predicted"),
        }
        return {"choices": [choice], "usage": usage}


@frozen
class _SGLangIds:
    """SGLang's own generate: prompt and answer as token ids."""

    name: str = "SGLang's generate"
    lists_what_it_serves: bool = True
    path: str = "/generate"

    def body(self, wanted: Wanted, *, model: str, prompt_ids: tuple[int, ...], limit: int, seed: int) -> dict[str, Any]:
        """A request."""
        return {"input_ids": list(prompt_ids), "sampling_params": self._sampling(wanted, limit, seed)}

    def impossible(self, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each sampling setting that decides what is drawn, below anything it may be."""
        names = ["temperature", "repetition_penalty"]
        names += ["top_p", "top_k", "min_p"] if wanted.sampling.temperature > 0 else []
        for name in names:
            yield name, {"sampling_params": {**self._sampling(wanted, 1, 0), name: -7}}

    def in_form(self, content: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Its `output_ids`, with the stop token where only meta_info has it."""
        meta, ids = _meta(content), content.get("output_ids")
        end = meta.get("finish_reason")
        ended = end if isinstance(end, dict) else {}
        matched = ended.get("matched")
        if isinstance(ids, list) and type(matched) is int and matched not in ids[-1:]:
            ids = [*ids, matched]
        choice = {"text": content.get("text"), "finish_reason": ended.get("type"), "token_ids": ids}
        usage = {"prompt_tokens": meta.get("prompt_tokens"), "completion_tokens": meta.get("completion_tokens")}
        return {"choices": [choice], "usage": usage}

    def _sampling(self, wanted: Wanted, limit: int, seed: int) -> dict[str, Any]:
        sampling = wanted.sampling
        seeded = {"sampling_seed": seed % _SEEDS} if sampling.temperature > 0 else {}
        return {
            "max_new_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(wanted.stop_ids),
            "skip_special_tokens": False,
            **seeded,
        }


@frozen
class SGLang:
    """SGLang. The names in meta_info changed between versions; each is tried, the newest first."""

    name: str = "SGLang"
    owner: str = "sglang"
    dialect: Dialect = _SGLangIds()
    counters: Names = _SGLANG
    shows_counters: str = "Start it with --enable-metrics."
    tells_in_answers: bool = True

    def tally(self, content: dict[str, Any]) -> Tally | None:
        """The rounds in meta_info. Fault where its numbers contradict each other."""
        meta = _meta(content)
        rounds = meta.get("spec_verify_ct")
        if type(rounds) is not int:
            return None
        accepted = _first(meta, ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num"))
        proposed = _first(meta, ("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num"))
        histogram = next(
            (
                meta[name]
                for name in ("spec_correct_drafts_histogram", "spec_accept_histogram")
                if isinstance(meta.get(name), list)
            ),
            None,
        )
        at = None
        if histogram is not None and all(type(one) is int and one >= 0 for one in histogram):
            summed = sum(count * rounds_of for count, rounds_of in enumerate(histogram))
            if sum(histogram) != rounds or (accepted is not None and accepted != summed):
                raise Fault(Kind.BAD, f"numbers of rounds that contradict each other: {shown(str(meta))}")
            accepted, at = summed, tuple(sum(histogram[k + 1 :]) for k in range(len(histogram) - 1))
        if rounds == 0 and not accepted and not proposed:
            # It ended at its first token, which the prompt's own pass gives. Some versions then tell nothing more.
            return Tally(rounds=0, proposed=0, accepted=0, accepted_at=())
        if accepted is None:
            raise Fault(Kind.BAD, f"rounds without what they accepted: {shown(str(meta))}")
        return Tally(rounds=rounds, proposed=proposed, accepted=accepted, accepted_at=at)


VLLM: Final = Counting(
    name="vLLM",
    owner="vllm",
    dialect=_TOKEN_IDS,
    counters=_VLLM,
    shows_counters="Start it without --disable-log-stats.",
)
LLAMA_CPP: Final = Counting(
    name="llama.cpp",
    owner="llamacpp",
    dialect=_LlamaCppIds(),
    counters=_LLAMA_CPP,
    shows_counters="Start it with --metrics.",
)
ENGINES: Final[tuple[Engine, ...]] = (VLLM, LLAMA_CPP, SGLang())


def engine_of(models: Sequence[Mapping[str, Any]]) -> Engine | None:
    """The engine whose list of models this is; None where it is none that can be measured."""
    owners = {model.get("owned_by") for model in models}
    return next((engine for engine in ENGINES if engine.owner in owners), None)


def _meta(content: Mapping[str, Any]) -> dict[str, Any]:
    meta = content.get("meta_info")
    if not isinstance(meta, dict):
        raise Fault(Kind.BAD, f"no meta_info: {shown(str(content))}")
    return meta


def _first(meta: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((meta[name] for name in names if type(meta.get(name)) is int), None)
