"""The connector that runs inside vLLM: what it writes and when, under which name, and what is left of a failure."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from vllm_interface import LAYER, config, load_connector, request, scheduled

from deepspec_core.cache.quantize import encode

BLOCKS, LAYERS, HIDDEN = 8, 3, 16
_NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, _NEEDS_GPU))]
# Seven tokens in two blocks that do not follow each other.
IDS, OWN_BLOCKS = [5, 6, 7, 8, 9, 10, 11], [6, 2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_connector(monkeypatch)


class Sides:
    """A connector in the scheduler and one in the worker, as vLLM has them, and the states in the worker's cache."""

    def __init__(self, module: ModuleType, folder: Path, *, device: str = "cpu", **options: Any) -> None:
        self.folder = folder
        self.scheduler, self.worker = (
            module.DeepSpecHiddenStates(vllm, side, cache)
            for side, (vllm, cache) in (("scheduler", config(folder, **options)), ("worker", config(folder, **options)))
        )
        torch.manual_seed(0)
        self.states = (torch.randn(BLOCKS, LAYERS, 4, HIDDEN) * 100).to(device)
        self.worker.register_kv_caches({"other": torch.zeros(1), LAYER: self.states})

    def step(self, output: Any, ended: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
        """One step of the engine; the requests whose blocks are free."""
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        free, _ = self.worker.get_finished(set(ended))
        self.worker.wait_for_save()
        return free or set()

    def asked(self, one: Any, blocks: list[int]) -> dict[str, Any]:
        """A request from its coming to its answer, which is returned; its file is written in the next step."""
        self.scheduler.on_new_request(one)
        self.step(scheduled({one.request_id: len(one.prompt_token_ids)}))
        kept, said = self.scheduler.request_finished_all_groups(one, (blocks,))
        assert kept == ("hidden_states_path" in (said or {}))
        return said or {}

    def own(self, count: int) -> torch.Tensor:
        """The states of OWN_BLOCKS, by hand: [T, K, H]."""
        return torch.cat([self.states[block].transpose(0, 1) for block in OWN_BLOCKS])[:count].cpu()


@pytest.fixture
def sides(module: ModuleType, tmp_path: Path) -> Callable[..., Sides]:
    return lambda **options: Sides(module, tmp_path, **options)


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As a trainer reads: behind the lock."""
    with open(f"{path}.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_is_written_under_its_name(sides: Callable[..., Sides], device: str) -> None:
    both = sides(device=device)
    said = both.asked(request("r1", IDS, file="ds-1-a"), OWN_BLOCKS)
    assert said == {"hidden_states_path": str(both.folder / "ds-1-a.safetensors")}
    # The answer is out, and nobody reads before the file is there.
    with open(f"{said['hidden_states_path']}.lock", "rb") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    free = both.step(scheduled({}), {"r1"})
    for _ in range(1000 if device == "cuda" else 0):
        free = free or both.step(scheduled({}))  # a copy takes as long as it takes
    assert free == {"r1"}
    # Its blocks are another's by now; what was written is what they held.
    expected = both.own(len(IDS)).clone()
    both.states.zero_()
    tensors, metadata = _read(said["hidden_states_path"])
    assert torch.equal(tensors["hidden_states"], expected)
    assert tensors["token_ids"].tolist() == IDS
    assert metadata == {"layers": json.dumps([2, 4, 12]), "normed": "false"}
    assert sorted(os.listdir(both.folder)) == ["ds-1-a.safetensors", "ds-1-a.safetensors.lock"]
    both.worker.shutdown()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3"])
def test_numbers_are_those_of_the_cache(sides: Callable[..., Sides], dtype: str, device: str) -> None:
    both = sides(dtype=dtype, device=device)
    both.states[6, 1, 0] = 0  # a token whose states are all 0
    said = both.asked(request("r1", IDS, file="a"), OWN_BLOCKS)
    both.step(scheduled({}), {"r1"})
    tensors, _ = _read(said["hidden_states_path"])
    array, scales = encode(both.own(len(IDS)).flatten(1), dtype, HIDDEN)
    bits = tensors["hidden_states"].view(torch.uint8 if scales is not None else torch.uint16)
    assert (bits.flatten(1).numpy() == array).all()
    if scales is not None:
        assert (tensors["hidden_states_scale"].numpy() == scales).all()


def test_the_answer_is_written_too_where_that_is_asked(sides: Callable[..., Sides]) -> None:
    both = sides()
    said = both.asked(request("r1", IDS, include_output_tokens=True), OWN_BLOCKS)
    both.step(scheduled({}), {"r1"})
    # The last token was never read by the target: here that is the only one it generated.
    assert _read(said["hidden_states_path"])[0]["token_ids"].tolist() == IDS
    one = request("r2", IDS[:5], include_output_tokens=True)
    one.all_token_ids = [*IDS, 99]
    said = both.asked(one, OWN_BLOCKS)
    both.step(scheduled({}), {"r2"})
    tensors, _ = _read(said["hidden_states_path"])
    assert tensors["token_ids"].tolist() == IDS
    assert torch.equal(tensors["hidden_states"], both.own(len(IDS)))


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        ([[4], [2], [9]], [4, 2]),
        ([[4], [2, 9], [8]], [4, 2]),  # the step after the end was under way already
        ([[4, 5], [6], [9]], [4, 5, 6]),
        ([[4], [5]], [4]),  # it was ended early: the last token was not read
    ],
)
def test_an_answer_is_read_to_its_end(sides: Callable[..., Sides], steps: list[list[int]], answer: list[int]) -> None:
    """A stop token, or the limit of three, lets the request end with the next token; the file ends with the answer."""
    both = sides()
    one = request("r1", IDS[:4], file="a", include_output_tokens=True, whole_answer=True)
    one.sampling_params, one.max_tokens = SimpleNamespace(stop_token_ids=[2, 3]), 3
    one.num_prompt_tokens, one.output_token_ids = 4, []
    both.scheduler.on_new_request(one)
    assert (one.sampling_params.stop_token_ids, one.max_tokens) == ([], 4)
    both.step(scheduled({"r1": 4}))
    for number, tokens in enumerate(steps):
        assert len(one.output_token_ids) < one.max_tokens
        one.output_token_ids += tokens
        if number < len(steps) - 1:
            both.step(scheduled({}, {"r1": (4 + number, 1)}))
    assert len(one.output_token_ids) >= one.max_tokens or steps[-1] == [5]
    one.all_token_ids = [*IDS[:4], *one.output_token_ids]
    _, said = both.scheduler.request_finished_all_groups(one, (OWN_BLOCKS,))
    both.step(scheduled({}), {"r1"})
    tensors, _ = _read((said or {})["hidden_states_path"])
    assert tensors["token_ids"].tolist() == [*IDS[:4], *answer]
    assert torch.equal(tensors["hidden_states"], both.own(4 + len(answer)))


def test_a_request_may_ask_for_no_file(sides: Callable[..., Sides]) -> None:
    both = sides()
    assert both.asked(request("r1", IDS, write=False), OWN_BLOCKS) == {}
    assert both.step(scheduled({}), {"r1"}) == set()
    assert list(both.folder.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "", "x" * 201, 3, None, ["a"]])
def test_a_name_that_is_none_is_refused(sides: Callable[..., Sides], name: object) -> None:
    both = sides()
    said = both.asked(request("r1", IDS, file=name), OWN_BLOCKS)
    assert "letters, digits and dashes" in said["hidden_states_error"]
    assert both.step(scheduled({}), {"r1"}) == set()
    assert list(both.folder.iterdir()) == []


def test_a_request_without_a_name_takes_none_of_its_own_id(sides: Callable[..., Sides]) -> None:
    both = sides()
    said = both.asked(request("../../etc/x", IDS), OWN_BLOCKS)
    assert Path(said["hidden_states_path"]).parent == both.folder


def test_nothing_is_left_of_a_request_that_is_given_up(sides: Callable[..., Sides]) -> None:
    both = sides()
    assert both.asked(request("r1", IDS, aborted=True, file="a"), OWN_BLOCKS) == {}
    assert [path.name for path in both.folder.iterdir()] == ["a.safetensors.lock"]
    assert both.step(scheduled({}), {"r1"}) == set()
    assert list(both.folder.iterdir()) == []


def test_a_name_that_is_taken_is_left_alone(sides: Callable[..., Sides], caplog: pytest.LogCaptureFixture) -> None:
    both = sides()
    (both.folder / "a.safetensors.lock").write_text("somebody's")
    both.asked(request("r1", IDS, file="a"), OWN_BLOCKS)
    assert both.step(scheduled({}), {"r1"}) == {"r1"}, "its blocks are free all the same"
    both.worker.shutdown()
    assert [path.name for path in both.folder.iterdir()] == ["a.safetensors.lock"]
    assert "a.safetensors.lock" in caplog.text


def test_a_full_disk_leaves_no_half_of_a_file(
    sides: Callable[..., Sides], module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = sides()

    def full(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    both.asked(request("r1", IDS, file="a"), OWN_BLOCKS)
    both.step(scheduled({}), {"r1"})
    both.worker.shutdown()
    assert list(both.folder.iterdir()) == []
    assert "No space left" in caplog.text


def test_a_step_without_states_spoils_its_requests(sides: Callable[..., Sides]) -> None:
    """vLLM keeps no states of any request of a step in which one comes to the last position."""
    both = sides(positions=16)
    for name, ids in (("long", IDS), ("short", IDS[:3]), ("later", IDS[:3])):
        both.scheduler.on_new_request(request(name, ids, file=name))
    both.step(scheduled({"short": 3}, {"long": (14, 2)}))
    both.step(scheduled({"later": 3}, {"long": (14, 1)}))
    _, said = both.scheduler.request_finished(request("short", IDS[:3]), OWN_BLOCKS)
    assert "--max-model-len" in said["hidden_states_error"]
    _, said = both.scheduler.request_finished(request("later", IDS[:3]), OWN_BLOCKS)
    assert "hidden_states_path" in said


def test_states_that_are_not_all_kept_are_not_written(sides: Callable[..., Sides]) -> None:
    both = sides()
    assert "part of the tokens" in both.asked(request("r1", IDS), OWN_BLOCKS[:1])["hidden_states_error"]


def test_what_does_not_fit_is_refused_at_the_start(module: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shared_storage_path"):
        module.DeepSpecHiddenStates(config(tmp_path / "none")[0], "worker", config(tmp_path)[1])
    with pytest.raises(ValueError, match="dtype"):
        module.DeepSpecHiddenStates(config(tmp_path, dtype="int8")[0], "worker", config(tmp_path)[1])
    vllm, cache = config(tmp_path, layers=(2, 12))
    with pytest.raises(ValueError, match="in a layout that this connector does not know"):
        module.DeepSpecHiddenStates(vllm, "worker", cache).register_kv_caches({LAYER: torch.zeros(8, 3, 4, 16)})
    vllm.speculative_config.method = "eagle3"
    with pytest.raises(ValueError, match="extract_hidden_states"):
        module.DeepSpecHiddenStates(vllm, "worker", cache)
