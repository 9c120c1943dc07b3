"""A server on loopback that gives hidden states, in the test process, with every fault that such a server can have.

It computes them with a target in this process, and writes them as the protocol says. Knows HTTP and files; not what is
tested with it.
"""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stand_in_server import StandIn, _break, _say, _say_json
from torch import Tensor

from deepspec_core.cache.quantize import encode
from deepspec_core.contracts.target import TargetModel
from deepspec_core.data.tokenize import ChatTokenizer

HTML = b"<html><body>Welcome to the gateway</body></html>"
ONE_AT_A_TIME = threading.Lock()
States = Callable[[list[int]], Tensor]


def states_of(target: TargetModel, taps: Sequence[int]) -> States:
    """ids -> [T, K, H]: the taps, rising, and the normed final state."""

    def computed(ids: list[int]) -> Tensor:
        input_ids, size = torch.tensor([ids]), target.architecture.hidden_size
        with ONE_AT_A_TIME:
            found = target.features(input_ids, torch.ones_like(input_ids).bool(), None, None, tuple(taps))
        hidden = found.hidden[0].view(len(ids), -1, size)
        return torch.cat([hidden, found.last_hidden[0][:, None]], 1)

    return computed


class FeatureStandIn(StandIn):
    """`faults`: what the next requests get in place of a good answer, one each; `always`: what all get, probes too.

    sample: The text of probes, which `faults` spare. `paths`: the files that were written. `dtype`: of the files.
    """

    def __init__(self, states: States, layers: Sequence[int], folder: Path, *, model: str = "tiny") -> None:
        self.states, self.layers, self.folder = states, tuple(layers), folder
        self.dtype, self.normed, self.says_layers = "float32", "true", True
        self.sample: list[int] | None = None
        self.paths: list[Path] = []
        self.held: list[int] = []
        self.most_files = 0
        self.slow = 0.0
        super().__init__(None, None, (), "vllm")  # type: ignore[arg-type]
        self.model = model

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.dead:
            return _break(handler)
        if body["model"] != self.model:
            return _say_json(handler, {"error": f"no model {body['model']}"}, status=404)
        asked = body["prompt"] != self.sample
        fault = self.always or (self.faults.pop(0) if self.faults and asked else None)
        if asked:
            self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.slow:
                self._released.wait(self.slow)
            if fault == "html":
                _say(handler, HTML, kind="text/html")
            elif not self._misbehaves(handler, fault):
                answer = self._written(body, fault)
                _break(handler) if self.dead else _say_json(handler, answer)
        finally:
            self.at_once -= 1
        return None

    def _written(self, body: dict[str, Any], fault: str | None) -> dict[str, Any]:
        ids, name = body["prompt"], body["kv_transfer_params"]["file"]
        folder = self.folder.parent / "elsewhere" if fault in ("outside", "symlink") else self.folder
        folder.mkdir(exist_ok=True)
        path = folder / f"{'other' if fault == 'other name' else name}.safetensors"
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if fault != "lost":
            self._save(path, ids, fault)
        if fault == "locked":
            self.held.append(lock)
        else:
            os.close(lock)
        if fault == "truncated":
            os.truncate(path, path.stat().st_size - 100)
        if fault == "cut":
            os.truncate(path, 5)
        if fault == "no safetensors":
            path.write_bytes(b"<html><body>Welcome</body></html>")
        if fault == "symlink":
            link = self.folder / path.name
            link.symlink_to(path)
            path = link
        self.paths.append(path)
        self.most_files = max(self.most_files, sum(each.suffix == ".safetensors" for each in self.folder.iterdir()))
        choice = {"index": 0, "text": "x", "finish_reason": "length"}
        said: dict[str, Any] = {"id": "1", "model": body["model"], "choices": [choice]}
        if fault == "refused":
            return {**said, "kv_transfer_params": {"hidden_states_error": "no more positions"}}
        return said if fault == "no path" else {**said, "kv_transfer_params": {"hidden_states_path": str(path)}}

    def _save(self, path: Path, ids: list[int], fault: str | None) -> None:
        states_TKH = self.states(ids)
        if fault == "layers":
            states_TKH = states_TKH[:, 1:]
        if fault == "nan":
            states_TKH[len(ids) // 2, 0, 3] = float("nan")
        if fault == "short":
            states_TKH = states_TKH[:-1]
        sent = [*ids[:-1], ids[-1] + 1] if fault == "wrong ids" else ids
        tensors = {"token_ids": torch.tensor(sent), "hidden_states": states_TKH.contiguous()}
        if fault == "double":
            tensors["hidden_states"] = states_TKH.double().contiguous()
        elif self.dtype == "float8_e4m3":
            T, K, H = states_TKH.shape
            bits, scales = encode(states_TKH.flatten(1), self.dtype, H)
            assert scales is not None
            stored = torch.from_numpy(bits).view(torch.float8_e4m3fn).view(T, K, H)
            tensors |= {"hidden_states": stored, "hidden_states_scale": torch.from_numpy(scales)}
        elif self.dtype == "bfloat16":
            tensors["hidden_states"] = states_TKH.bfloat16()
        metadata = {"layers": json.dumps(list(self.layers[::-1] if fault == "said layers" else self.layers))}
        said = metadata if self.says_layers else {}
        save_file(tensors, path, {**said, **({} if self.normed == "unsaid" else {"normed": self.normed})})


@contextmanager
def feature_servers(*servers: FeatureStandIn) -> Iterator[None]:
    """The servers, stopped in the end."""
    try:
        yield
    finally:
        for server in servers:
            for lock in server.held:
                os.close(lock)
            if not server.dead:
                server.stop()


class AnsweringStandIn(FeatureStandIn):
    """It answers too, and writes the states of prompt and answer in the same request, as our connector does.

    `answer_faults`: what the next answers with a file get, one each: faults of features, "fewer" (the last token's
    states are missing, as of an engine that does not know `whole_answer`), or "half" an answer. `answered`: bodies.
    """

    def __init__(self, states: States, layers: Sequence[int], folder: Path, target: Any, *, model: str) -> None:
        super().__init__(states, layers, folder, model=model)
        self.target, self.tokenizer = target.model, ChatTokenizer(target.tokenizer)
        self.stop_ids = tuple(target.architecture.stop_token_ids)
        self.answer_faults: list[str | None] = []
        self.answered: list[dict[str, Any]] = []
        self.dies_after: int | None = None
        self.knows = "all"  # as our connector does; "whole": but for `write`; "write": but for `whole_answer`

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if "return_token_ids" not in body:
            if self.knows != "whole" and body["kv_transfer_params"].get("write") is False:
                return _say_json(handler, {"choices": []})
            return super().post(handler, body)
        if self.dead or (self.dies_after is not None and len(self.answered) >= self.dies_after):
            return _break(handler)
        refused = self._refused(body)
        if refused is not None:
            return _say_json(handler, {"error": refused[1]}, status=refused[0])
        return _say_json(handler, self._both(body))

    def _both(self, body: dict[str, Any]) -> dict[str, Any]:
        asked, stops = body["kv_transfer_params"], body["stop_token_ids"]
        with ONE_AT_A_TIME:
            answer = self._answer(body, body["max_tokens"], None)
        if asked.get("write") is False:
            return answer
        assert body["ignore_eos"]
        assert set(stops) == set(self.stop_ids)
        fault = None
        if body["max_tokens"] > 1:  # no probe
            self.answered.append(body)
            fault = self.answer_faults.pop(0) if self.answer_faults else None
        choice = answer["choices"][0]
        ids = [*body["prompt"], *choice["token_ids"]]
        if fault == "half":
            choice["token_ids"] = choice["token_ids"][:1]
            return answer
        whole = asked["whole_answer"] and fault != "fewer" and self.knows != "write"
        file = self._written({**body, "prompt": ids if whole else ids[:-1]}, None if fault == "fewer" else fault)
        choice["token_ids"] = [*choice["token_ids"], 5, 6]  # what comes after the end
        return {**answer, **{key: value for key, value in file.items() if key == "kv_transfer_params"}}
