"""A server on loopback that speculates and counts, as vLLM, llama.cpp and SGLang do, each in its own formats.

It answers greedily with a target and a proposer in this process. Its faults are those of servers that cannot be
measured: other work meanwhile, a restart, no counters, a page in their place.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from stand_in_server import _ONE_AT_A_TIME, HTML, LEAST, StandIn, _say, _say_json

from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Request, decode

OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}
_OF_ROUNDS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class CountingServer(StandIn):
    """The server. `proposer` None: it does not speculate.

    metrics: "shown", "missing", "html" or "foreign". others: tokens that somebody else lets it generate before it
    answers. restarts: whether its counters fall to zero before it answers. invented: what it adds to its counters with
    each answer. no_ids: it leaves meta_info or ids out. ends_at_once: which of its answers end at their first token.
    without_rounds: what SGLang says of the rounds of such an answer: "all", "zero" (older versions), or "nothing".
    """

    def __init__(
        self,
        target: TargetModel,
        tokenizer: ChatTokenizer,
        stop_ids: Sequence[int],
        dialect: str,
        proposer: Proposer | None,
    ) -> None:
        self.proposer, self.metrics, self.others, self.restarts = proposer, "shown", 0, False
        self.counts: dict[str, int] = {}
        self.invented: dict[str, int] = {}
        self.at: list[int] = []
        self.ends_at_once: tuple[int, ...] = ()
        self.without_rounds = "all"
        super().__init__(target, tokenizer, stop_ids, dialect)

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/metrics":
            if self.metrics == "missing":
                return _say_json(handler, {"error": {"message": "This server does not support metrics"}}, status=501)
            if self.metrics == "html":
                return _say(handler, HTML, kind="text/html")
            text = "other_total 3\n" if self.metrics == "foreign" else self._counters()
            return _say(handler, text.encode(), kind="text/plain")
        if handler.path == "/v1/models" and self.always is None:
            entry: dict[str, Any] = {"id": self.model, "owned_by": OWNERS[self.dialect]}
            if self.dialect != "llama.cpp":
                entry["max_model_len"] = self.max_model_len
            return _say_json(handler, {"object": "list", "data": [entry]})
        return super().get(handler)

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.always == "html":
            return _say(handler, HTML, kind="text/html")
        native = {"sglang": "/generate", "llama.cpp": "/completion"}.get(self.dialect, "/v1/completions")
        if handler.path != native:
            return _say_json(handler, {"error": "no such path"}, status=404)
        asked = {**body, **body.get("sampling_params", {})}
        low = [name for name, least in LEAST.items() if asked.get(name, least) < least]
        if low and self.dialect != "llama.cpp":
            return _say_json(handler, {"error": f"{low[0]} is too small"}, status=400)
        limit = next(asked[name] for name in ("max_tokens", "max_new_tokens", "n_predict") if name in asked)
        if limit > 16:  # neither a probe nor a warm-up
            self.asked.append(body)
            if self.restarts:
                self.counts, self.at = {}, []
            self._count("generated", self.others)
            for name, number in self.invented.items():
                self._count(name, number)
            if self.faults:
                return _say_json(handler, {"error": self.faults.pop(0)}, status=500)
        prompt_ids = tuple(asked["prompt"] if "prompt" in asked else asked["input_ids"])
        at_once = limit > 16 and len(self.asked) in self.ends_at_once
        done = _ended(prompt_ids, self.stop_ids[0]) if at_once else self._decoded(prompt_ids, limit)
        self._count("generated", len(done.output_ids))
        for one in done.rounds if self.proposer is not None else ():
            for name, number in zip(_OF_ROUNDS, (1, one.proposal_length, one.accepted_draft_length), strict=True):
                self._count(name, number)
            self.at += [0] * (one.proposal_length - len(self.at))
            for k in range(one.accepted_draft_length):
                self.at[k] += 1
        return _say_json(handler, self._said(done, asked))

    def _decoded(self, prompt_ids: tuple[int, ...], limit: int) -> Completion:
        with _ONE_AT_A_TIME:
            (done,) = decode(
                self.target,
                self.proposer,
                [Request(id="x", prompt_ids=prompt_ids, seed=0)],
                sampling=Sampling(),
                stop_ids=self.stop_ids,
                max_new_tokens=limit,
                batch_size=1,
                max_length=4096,
            )
        return done

    def _count(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def _counters(self) -> str:
        count = self.counts.get
        if self.dialect == "sglang":
            return f'sglang:generation_tokens_total{{model_name="m"}} {count("generated", 0)}.0\n'
        prefix, generated = {"vllm": ("vllm", "generation_tokens"), "llama.cpp": ("llamacpp", "tokens_predicted")}[
            self.dialect
        ]
        labels = 'engine="0",model_name="a } b"' if prefix == "vllm" else ""
        braces = f"{{{labels}}}" if labels else ""
        lines = ["# HELP x Some words.", f"{prefix}:{generated}_total{braces} {float(count('generated', 0))}"]
        if self.proposer is not None or prefix == "llamacpp":
            lines += [f"{prefix}:spec_decode_{name}_total{braces} {float(count(name, 0))}" for name in _OF_ROUNDS]
        for k, number in enumerate(self.at):
            inside = ",".join(filter(None, [labels, f'position="{k}"']))
            lines.append(f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total{{{inside}}} {number}")
        return "\n".join([*lines, ""])

    def _said(self, done: Completion, asked: dict[str, Any]) -> dict[str, Any]:
        output, ended = list(done.output_ids), done.finish_reason == "stop"
        text = self.tokenizer.decode(output[:-1] if ended else output)
        if self.dialect == "llama.cpp":
            settings = {name: asked[name] for name in ("temperature", "top_k", "top_p", "min_p")}
            return {
                "content": text,
                "tokens": output,
                "stop_type": "eos" if ended else "limit",
                "tokens_predicted": len(output),
                "tokens_evaluated": len(done.prompt_ids),
                "generation_settings": settings,
            }
        if self.dialect == "sglang":
            meta: dict[str, Any] = {"prompt_tokens": len(done.prompt_ids), "completion_tokens": len(output)}
            meta["finish_reason"] = {"type": "stop", "matched": output[-1]} if ended else {"type": "length"}
            if self.proposer is not None and not done.rounds and self.without_rounds != "all":
                meta |= {"spec_verify_ct": 0} if self.without_rounds == "zero" else {}
            elif self.proposer is not None:
                longest = max((one.proposal_length for one in done.rounds), default=0)
                histogram = [0] * (longest + 1)
                for one in done.rounds:
                    histogram[one.accepted_draft_length] += 1
                accepted = sum(one.accepted_draft_length for one in done.rounds)
                meta |= {"spec_verify_ct": len(done.rounds), "spec_accept_histogram": histogram}
                meta |= {"spec_accept_token_num": accepted}
                meta |= {"spec_draft_token_num": sum(one.proposal_length for one in done.rounds)}
            return {"text": text, "output_ids": output, "meta_info": meta}
        choice = {"index": 0, "text": text, "finish_reason": done.finish_reason, "token_ids": output}
        usage = {"prompt_tokens": len(done.prompt_ids), "completion_tokens": len(output)}
        return json.loads(json.dumps({"model": asked["model"], "choices": [choice], "usage": usage}))


def _ended(prompt_ids: tuple[int, ...], stop_id: int) -> Completion:
    return Completion(id="x", prompt_ids=prompt_ids, output_ids=(stop_id,), finish_reason="stop", rounds=())


@contextmanager
def counting(
    target: TargetModel,
    tokenizer: ChatTokenizer,
    stop_ids: Sequence[int],
    dialect: str,
    proposer: Proposer | None,
) -> Iterator[CountingServer]:
    """Such a server; it is stopped in the end."""
    server = CountingServer(target, tokenizer, stop_ids, dialect, proposer)
    try:
        yield server
    finally:
        if not server.dead:
            server.stop()
