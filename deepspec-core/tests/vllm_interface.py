"""The part of vLLM that the connector is written for, as modules without vLLM, so that it runs in fast tests.

Knows names and signatures; what vLLM does with a connector is tested with vLLM itself (tests/test_features_by_vllm.py).
"""

import importlib.util
import logging
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deepspec_core.servers.vllm_command import CONNECTOR

LAYER = "cache_only_layers.12"


class RequestStatus(Enum):
    """How a request ended."""

    FINISHED_LENGTH_CAPPED = 1
    FINISHED_ABORTED = 2


class _Base:
    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_transfer_config = vllm_config, vllm_config.kv_transfer_config
        self._metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def has_connector_metadata(self) -> bool:
        return self._metadata is not None

    def _get_connector_metadata(self) -> Any:
        return self._metadata


def load_connector(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The connector's module, over modules of vLLM's names."""

    def offer(name: str, **content: Any) -> None:
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)

    layer, spec = type("CacheOnlyAttentionLayer", (), {}), type("HiddenStateCacheSpec", (SimpleNamespace,), {})
    offer("vllm")
    offer("vllm.config", get_layers_from_vllm_config=lambda config, kind, names: dict.fromkeys({LAYER} & set(names)))
    base = {"KVConnectorBase_V1": _Base, "KVConnectorMetadata": object, "SupportsHMA": type("SupportsHMA", (), {})}
    offer("vllm.distributed.kv_transfer.kv_connector.v1.base", **base)
    offer("vllm.distributed.parallel_state", get_tensor_model_parallel_rank=lambda: 0)
    offer("vllm.logger", init_logger=logging.getLogger)
    offer("vllm.model_executor.models.extract_hidden_states", CacheOnlyAttentionLayer=layer)
    offer("vllm.v1.kv_cache_interface", HiddenStateCacheSpec=spec)
    offer("vllm.v1.request", RequestStatus=RequestStatus)
    for parent in ("vllm.distributed", "vllm.model_executor", "vllm.v1", "vllm.model_executor.models"):
        offer(parent) if parent not in sys.modules else None
    for parent in ("vllm.distributed.kv_transfer", "vllm.distributed.kv_transfer.kv_connector"):
        offer(parent)
    offer("vllm.distributed.kv_transfer.kv_connector.v1")
    found = importlib.util.spec_from_file_location("deepspec_vllm_connector", CONNECTOR)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, found.name, module)
    found.loader.exec_module(module)
    return module


def config(folder: Path, *, layers: Iterable[int] = (4, 2, 12), positions: int = 64, **options: Any) -> tuple[Any, Any]:
    """vLLM's configuration, and that of its cache: blocks of four tokens."""
    draft = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=list(layers)))
    extra = {"shared_storage_path": str(folder), **options}
    vllm = SimpleNamespace(
        speculative_config=SimpleNamespace(
            method="extract_hidden_states", num_speculative_tokens=1, draft_model_config=draft
        ),
        kv_transfer_config=SimpleNamespace(get_from_extra_config=extra.get),
        model_config=SimpleNamespace(max_model_len=positions),
    )
    groups = [SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=4))]
    return vllm, SimpleNamespace(kv_cache_groups=groups)


def request(name: str, ids: list[int], *, aborted: bool = False, **params: Any) -> Any:
    """A request as a connector sees it, with one generated token."""
    status = RequestStatus.FINISHED_ABORTED if aborted else RequestStatus.FINISHED_LENGTH_CAPPED
    return SimpleNamespace(
        request_id=name, prompt_token_ids=ids, all_token_ids=[*ids, 7], kv_transfer_params=params, status=status
    )


def scheduled(new: dict[str, int], running: dict[str, tuple[int, int]] | None = None) -> Any:
    """A step: new requests with their tokens, running ones with (tokens computed, tokens now)."""
    running = running or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=0) for name in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(running), num_computed_tokens=[before for before, _ in running.values()]
        ),
        num_scheduled_tokens={**new, **{name: now for name, (_, now) in running.items()}},
    )
