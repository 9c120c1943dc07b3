"""A KV connector for vLLM 0.32: it writes the hidden states that the target computed for a request to a file.

vLLM loads this file by `kv_connector_module_path`, in an environment that may have no DeepSpec. So this file imports
only torch, safetensors and vLLM, and its folder has no other file. It knows files and vLLM's interface for connectors.
It does not know what the states are used for.

The server runs with `--speculative-config {"method": "extract_hidden_states", ...}`. vLLM then keeps the states of the
requested layers beside its KV cache, and the connector reads them from there when a request has ended.

The file is `SHARED_STORAGE_PATH/NAME.safetensors`. It has `token_ids` [T] and `hidden_states` [T, K, H], and for
float8_e4m3 also `hidden_states_scale` [T, K]. Its metadata has `layers` and `normed`. `layers` are the K ids in vLLM's
numbering: i is the input of decoder layer i, and the number of layers is the output of the last one. `normed` is
"false", because that output is taken before the target's final norm. The file is written under another name and then
renamed. A flock on FILE.lock is held from before the response until the rename.

These keys of a request's `kv_transfer_params` are read:
- "file": NAME of the file. Without it, the name is random. A name can be used again when its file has been removed.
- "write": false for no file.
- "include_output_tokens": true to write the states of the answer too, except those of its last token, which the target
  has not read.
- "whole_answer": true to have the target read that token as well. At one of the request's stop_token_ids or at
  max_tokens, the request goes on until the next token exists. So the response has one or a few more tokens, which the
  client discards. The file ends with the answer. Such a request has `"ignore_eos": true`.

The response's `kv_transfer_params` has `hidden_states_path`, or `hidden_states_error` if no file is written.

Options, in `kv_connector_extra_config`: `shared_storage_path`; `dtype`: float32, bfloat16 or float8_e4m3, by default
the engine's own; `writers`: the number of threads that write, by default 4.

On a CUDA device the states are copied on a separate stream. That part was written on a CPU and has not been run.

Legend: T tokens, K requested layers, H hidden size.
"""

import fcntl
import hashlib
import json
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.config import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec
from vllm.v1.request import RequestStatus

# vLLM shows what its own loggers say, and this name is below theirs.
log = init_logger("vllm.deepspec_vllm_connector")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8_e4m3": torch.float8_e4m3fn}
_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
# What a request may call its file: no separators, no dots.
_NAME = re.compile(r"[A-Za-z0-9-]{1,200}")
_SPOILT = "the engine ran out of positions in a step of this request: serve with a greater --max-model-len"


@dataclass
class Ended:
    """A request that has ended: where its states lie in the cache, and where they go."""

    path: str
    token_ids: list[int]
    block_ids: list[int]


@dataclass
class Whole:
    """A request whose answer is to be read to its end: what ends it, and how much of it was looked at for that."""

    request: Any
    stop_ids: frozenset[int]
    most: int
    seen: int = 0
    length: int | None = None

    def look(self) -> None:
        """Where the answer is over, let the request end with the next token: the step that makes it reads the last."""
        output = self.request.output_token_ids
        while self.length is None and self.seen < len(output):
            self.seen += 1
            if output[self.seen - 1] in self.stop_ids or self.seen == self.most:
                self.length = self.seen
                self.request.max_tokens = min(self.request.max_tokens, len(output) + 1)


@dataclass
class Step(KVConnectorMetadata):  # type: ignore[misc]
    """What the scheduler tells the worker in a step, by request: files that will be written, and files to write."""

    begun: dict[str, str] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)


class DeepSpecHiddenStates(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """The connector; vLLM makes one in its scheduler and one in each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        speculative = vllm_config.speculative_config
        if speculative is None or speculative.method != "extract_hidden_states":
            raise ValueError('this connector needs --speculative-config with "method": "extract_hidden_states"')
        option = vllm_config.kv_transfer_config.get_from_extra_config
        folder, dtype = option("shared_storage_path", None), option("dtype", None)
        if folder is None or not Path(folder).is_dir():
            raise ValueError(f"kv_connector_extra_config.shared_storage_path must be a folder that exists: {folder!r}")
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"kv_connector_extra_config.dtype must be one of {', '.join(_DTYPES)}: {dtype!r}")
        # Absolute: whoever reads may have another working directory.
        self._folder, self._dtype = Path(folder).resolve(), dtype
        # The order in which models hand the states out, whatever the order of the list.
        self._layers = sorted(set(speculative.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids))
        self._group, self._block_size = _place(kv_cache_config)
        self._most_positions = vllm_config.model_config.max_model_len - speculative.num_speculative_tokens
        # Of the scheduler: paths of requests that run, why some will have none, and what the next step writes.
        self._paths: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._to_write: dict[str, Ended] = {}
        self._whole: dict[str, Whole] = {}
        # Of the worker.
        self._states: torch.Tensor | None = None
        self._locks: dict[str, tuple[int, str]] = {}
        self._copies: dict[str, torch.cuda.Event | None] = {}
        self._over: set[str] = set()
        self._writers = ThreadPoolExecutor(int(option("writers", 4)), thread_name_prefix="hidden-states")
        self._stream: torch.cuda.Stream | None = None

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded from outside."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded from outside."""

    def on_new_request(self, request: Any) -> None:
        """The name of the request's file, or why it will have none."""
        # The request's id may hold what the client sent: its digest is what names a file without a name.
        by_chance = "request-" + hashlib.sha256(request.request_id.encode()).hexdigest()[:20]
        asked = request.kv_transfer_params or {}
        if asked.get("write") is False:
            return
        if asked.get("whole_answer", False) and request.sampling_params is not None:
            sampling, most = request.sampling_params, request.max_tokens
            self._whole[request.request_id] = Whole(request, frozenset(sampling.stop_token_ids or ()), most)
            sampling.stop_token_ids, request.max_tokens = [], most + 1
        name = asked.get("file", by_chance)
        if isinstance(name, str) and _NAME.fullmatch(name):
            self._paths[request.request_id] = str(self._folder / f"{name}.safetensors")
        else:
            self._refused[request.request_id] = "file must be 1 to 200 letters, digits and dashes"

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        """What the workers are told in this step."""
        step = Step(ended=self._to_write)
        self._to_write = {}
        for whole in self._whole.values():
            whole.look()
        for new in scheduler_output.scheduled_new_reqs:
            if new.req_id in self._paths:
                step.begun[new.req_id] = self._paths[new.req_id]
        # vLLM takes no states in a step where one of its requests comes too near to the end of the positions.
        counts = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        before = {one.req_id: one.num_computed_tokens for one in scheduler_output.scheduled_new_reqs}
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        if any(before[name] + count > self._most_positions for name, count in counts.items()):
            self._refused |= dict.fromkeys(self._paths.keys() & counts.keys(), _SPOILT)
        return step

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether the request's blocks are still needed, and what its answer says of the file."""
        name = request.request_id
        path, refused = self._paths.pop(name, None), self._refused.pop(name, None)
        whole, asked = self._whole.pop(name, None), request.kv_transfer_params or {}
        if request.status == RequestStatus.FINISHED_ABORTED or asked.get("write") is False:
            return False, None  # nobody waits for it
        if whole is not None:
            whole.look()
            end = None if whole.length is None else request.num_prompt_tokens + whole.length
            token_ids = list(request.all_token_ids)[:-1][:end]
        elif asked.get("include_output_tokens", False):
            token_ids = list(request.all_token_ids)[:-1]
        else:
            token_ids = list(request.prompt_token_ids or ())
        if not token_ids and refused is None:
            refused = "the prompt was not given as tokens"
        elif len(token_ids) > len(block_ids) * self._block_size and refused is None:
            refused = "the engine keeps the states of a part of the tokens only"
        if refused is not None or path is None:
            return False, {"hidden_states_error": refused or "the request was not seen when it came"}
        self._to_write[name] = Ended(path=path, token_ids=token_ids, block_ids=list(block_ids))
        return True, {"hidden_states_path": path}

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same, of a cache in several groups."""
        return self.request_finished(request, block_ids[self._group] if self._group < len(block_ids) else [])

    def get_finished_count(self) -> int:
        """One worker writes, whatever the number of workers."""
        return 1

    # In the workers.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Where the states are kept, [blocks, K, block size, H]; only the worker that writes has them."""
        # All ranks of a pipeline's last stage hold the same states; the other stages hold none.
        names = list(get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)))
        if not names or get_tensor_model_parallel_rank() != 0:
            return
        (name,) = names
        shape = kv_caches[name].shape
        if len(shape) != 4 or shape[1] != len(self._layers) or shape[2] != self._block_size:
            expected = f"[blocks, {len(self._layers)}, {self._block_size}, hidden size]"
            raise ValueError(
                f"vLLM stores the hidden states in a layout that this connector does not know: "
                f"{list(shape)}, expected {expected}"
            )
        self._states = kv_caches[name]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded from outside."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded from outside."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved before a request has ended."""

    def wait_for_save(self) -> None:
        """Locks the files of requests that have begun, before anybody is told of them."""
        step = self._get_connector_metadata() if self.has_connector_metadata() else None
        if self._states is None or not isinstance(step, Step):
            return
        for name, path in step.begun.items():
            if name in self._locks:
                continue  # it was preempted, and begins again
            beside = f"{path}.lock"
            try:
                lock = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                # Whoever reads finds no file, and asks again.
                log.error(
                    "%s cannot be created or locked, so the features of its request are not written: %s", beside, error
                )
                continue
            self._locks[name] = lock, beside

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copies the states of requests that ended, and tells whose blocks may be used again."""
        step = self._get_connector_metadata() if self.has_connector_metadata() else None
        if self._states is None:
            return None, None
        if isinstance(step, Step):
            for name, ended in step.ended.items():
                self._take(name, ended)
        self._over |= finished_req_ids
        copied = {name for name in self._over & self._copies.keys() if _is_done(self._copies[name])}
        for name in copied:
            del self._copies[name]
        for name in (self._over - self._copies.keys()) & self._locks.keys():
            _withdraw(*self._locks.pop(name))  # it ended without anything to write
        self._over &= self._copies.keys()
        return copied or None, None

    def shutdown(self) -> None:
        """Lets what was begun be written; what was not begun loses its lock."""
        self._writers.shutdown(wait=True)
        for name in list(self._locks):
            _withdraw(*self._locks.pop(name))

    def _take(self, name: str, ended: Ended) -> None:
        """Copies a request's states out of the cache, and hands them to a writer."""
        states, lock = self._states, self._locks.pop(name, None)
        assert states is not None
        positions_T = torch.arange(len(ended.token_ids))
        blocks_T = torch.tensor(ended.block_ids)[positions_T // self._block_size]
        offsets_T = positions_T % self._block_size
        done: torch.cuda.Event | None = None
        if states.device.type == "cuda":
            # On a stream of its own, behind what has been computed so far: the next step need not wait for it.
            if self._stream is None:
                self._stream = torch.cuda.Stream(states.device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(states.device))
            with torch.cuda.stream(self._stream):
                index = (blocks_T.pin_memory(), offsets_T.pin_memory())
                blocks_T, offsets_T = (one.to(states.device, non_blocking=True) for one in index)
                tensors = {
                    key: torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
                    for key, value in _stored(states[blocks_T, :, offsets_T], self._dtype).items()
                }
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
        else:
            tensors = {"hidden_states": states[blocks_T, :, offsets_T].to("cpu")}
        self._copies[name] = done
        if lock is None:
            return  # said when the lock could not be made
        written = self._writers.submit(self._write, ended, tensors, done, *lock)
        written.add_done_callback(lambda future: _complain(future, ended.path))

    def _write(
        self, ended: Ended, tensors: dict[str, torch.Tensor], copied: "torch.cuda.Event | None", lock: int, locked: str
    ) -> None:
        """The file, and then the lock's end. Whatever happens, no half of a file and no lock is left."""
        beside = f"{ended.path}.partial"
        try:
            if copied is None:
                tensors = _stored(tensors["hidden_states"], self._dtype)
            else:
                copied.synchronize()
            tensors["token_ids"] = torch.tensor(ended.token_ids)
            about = {"layers": json.dumps(self._layers), "normed": "false"}
            save_file(tensors, beside, metadata=about)
            # As the lock, which has what this process gives new files: whoever reads may be another user.
            os.chmod(beside, os.fstat(lock).st_mode & 0o777)
            os.replace(beside, ended.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(beside)
            _withdraw(lock, locked)
            raise
        os.close(lock)


def _place(kv_cache_config: Any) -> tuple[int, int]:
    """Which group of the cache holds the states, and the tokens of one of its blocks."""
    groups = kv_cache_config.kv_cache_groups
    own = [number for number, group in enumerate(groups) if isinstance(group.kv_cache_spec, HiddenStateCacheSpec)]
    if not own and len(groups) == 1:
        own = [0]  # where every layer keeps as many tokens in a block, they share a group
    if len(own) != 1:
        raise ValueError(
            f"the hidden states must be in one group of the KV cache, but are in {len(own)} of {len(groups)}"
        )
    return own[0], groups[own[0]].kv_cache_spec.block_size


def _stored(states_TKH: torch.Tensor, dtype: str | None) -> dict[str, torch.Tensor]:
    """The tensors that are written. float8 has a power of two for each token and layer, as in DeepSpec's cache."""
    if dtype != "float8_e4m3":
        return {"hidden_states": states_TKH.to(_DTYPES[dtype] if dtype else states_TKH.dtype).contiguous()}
    values_TKH = states_TKH.float()
    peaks_TK = values_TKH.abs().amax(-1)
    scales_TK = torch.exp2(torch.ceil(torch.log2((peaks_TK / _FLOAT8_MAX).clamp(min=2.0**-100))))
    scaled_TKH = (values_TKH / scales_TK[..., None]).clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
    return {"hidden_states": scaled_TKH.to(torch.float8_e4m3fn).contiguous(), "hidden_states_scale": scales_TK}


def _is_done(copied: "torch.cuda.Event | None") -> bool:
    return copied is None or bool(copied.query())  # type: ignore[no-untyped-call]


def _withdraw(lock: int, path: str) -> None:
    """Removes a lock's file and ends the lock, so that nobody waits for what will not come."""
    with suppress(OSError):
        os.unlink(path)
    os.close(lock)


def _complain(written: "Future[None]", path: str) -> None:
    if (error := written.exception()) is not None:
        log.error("%s was not written: %r", path, error)
