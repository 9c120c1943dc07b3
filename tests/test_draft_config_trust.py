"""A draft's config.json is somebody else's: it loads as the same draft, or is refused before memory is taken for it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspec_core.checkpoints.inspection import inspect_draft
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.errors import CheckpointError, DeepSpecError
from deepspec_core.plugins.registry import Registry

ALGORITHMS = ("dflash", "dspark", "eagle3")


@pytest.fixture(scope="module")
def draft_folders(tmp_path_factory: pytest.TempPathFactory, tiny_target: Any, tiny_draft: Any) -> dict[str, Path]:
    """A checkpoint of each algorithm."""
    target = tiny_target("qwen3")
    folders = {name: tmp_path_factory.mktemp(name) / "draft" for name in ALGORITHMS}
    for name, folder in folders.items():
        save_draft(tiny_draft(name, target), target.adapter, folder)
    return folders


@pytest.fixture(scope="module", params=ALGORITHMS)
def draft_folder(request: pytest.FixtureRequest, draft_folders: dict[str, Path]) -> Path:
    return draft_folders[request.param]


@pytest.fixture(scope="module")
def own_draft(draft_folder: Path, registry: Registry) -> Any:
    """What the folder's own config.json loads as."""
    return _open(draft_folder, registry)


def _open(folder: Path, registry: Registry) -> Any:
    return load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))


def _with(folder: Path, tmp: Path, text: str) -> Path:
    """A folder with the same weights and another config.json."""
    tmp.mkdir(exist_ok=True)
    if not (tmp / "model.safetensors").exists():
        (tmp / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp / "config.json").write_text(text)
    return tmp


HUGE = [10**5, 10**9, 10**18, 10**30]
VALUES = st.one_of(
    st.sampled_from([*HUGE, -1, 0, 1.5, 1e300, True, False, None, "", "x", [], {}, [1], [True], ["1"], {"a": 1}]),
    st.integers(-5, 5),
    st.lists(st.integers(-3, 9), max_size=4),
    st.text(max_size=4),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=VALUES)
def test_any_value_of_any_key_is_harmless(
    draft_folder: Path, own_draft: Any, registry: Registry, data: st.DataObject, value: Any
) -> None:
    config = json.loads((draft_folder / "config.json").read_text())
    config[data.draw(st.sampled_from(sorted(config)))] = value
    changed = _with(draft_folder, draft_folder.parent / "changed", json.dumps(config))
    begin = time.monotonic()
    with suppress(DeepSpecError):
        found = _open(changed, registry)
        assert found.state_dict().keys() == own_draft.state_dict().keys()
        pairs = zip(found.parameters(), own_draft.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", '{"a": NaN}', '{"a": [-1e400]}', '{"a": 1, "a": 2}', "[" * 10**5, '{"a":' * 10**5],
)
def test_what_is_no_json_object_is_refused(draft_folder: Path, registry: Registry, tmp_path: Path, text: str) -> None:
    for use in (_open, lambda folder, registry: inspect_draft(folder, registry=registry)):
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            use(_with(draft_folder, tmp_path / "draft", text), registry)


def test_a_huge_file_is_not_read(draft_folder: Path, registry: Registry, tmp_path: Path) -> None:
    folder = _with(draft_folder, tmp_path / "draft", "{")
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(CheckpointError, match="too large"):
        _open(folder, registry)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope_parameters", {"rope_theta": theta}) for theta in (True, 0, -1, "1e4", None, 10**30)),
        ("rope_parameters", {}),
        ("rope_parameters", {"rope_type": "default"}),
        ("rope_parameters", {"rope_theta": True, "full_attention": {"rope_theta": 1e4}}),
        ("rope_theta", True),
        ("rope_theta", 0),
        ("head_dim", 0),
        ("head_dim", -8),
        *(("rms_norm_eps", value) for value in (0, -1, "small", None, True, 10**30, 1e14)),
        *(("max_position_embeddings", value) for value in (0, -4, 1.5, "many", 10**12, True)),
    ],
)
def test_a_key_that_makes_no_sense_is_named(
    draft_folder: Path, registry: Registry, tmp_path: Path, key: str, value: Any
) -> None:
    config = json.loads((draft_folder / "config.json").read_text()) | {key: value}
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used") as caught:
        _open(_with(draft_folder, tmp_path / "draft", json.dumps(config)), registry)
    said = "rope_theta" if key.startswith("rope") else key
    assert said in str(caught.value.where)


@pytest.mark.parametrize("layers", [1, 3])
def test_fewer_layers_of_the_target_than_the_draft_reads_are_refused(
    draft_folder: Path, registry: Registry, tmp_path: Path, layers: int
) -> None:
    config = json.loads((draft_folder / "config.json").read_text())
    assert max(config["target_layer_ids"]) >= 3
    folder = _with(draft_folder, tmp_path / "draft", json.dumps(config | {"num_target_layers": layers}))
    for use in (_open, lambda folder, registry: inspect_draft(folder, registry=registry)):
        with pytest.raises(CheckpointError, match="layers that its target does not have") as caught:
            use(folder, registry)
        assert str(caught.value.where).endswith("num_target_layers")


def test_rotary_frequencies_that_are_no_numbers_are_refused(
    draft_folder: Path, registry: Registry, tmp_path: Path
) -> None:
    config = json.loads((draft_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}
    with pytest.raises(CheckpointError, match="constants that are not finite numbers"):
        _open(_with(draft_folder, tmp_path / "draft", json.dumps(config)), registry)


@pytest.mark.parametrize("changes", [{"rope_theta": 1e4, "rope_parameters": {}}, {"rope_theta": 10000}])
def test_the_older_spelling_of_rotary_keys_is_read(
    draft_folder: Path, registry: Registry, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = json.loads((draft_folder / "config.json").read_text())
    del config["rope_parameters"]
    found = _open(_with(draft_folder, tmp_path / "draft", json.dumps(config | changes)), registry)
    own = _open(draft_folder, registry)
    assert all(torch.equal(one, other) for one, other in zip(found.buffers(), own.buffers(), strict=True))


@pytest.mark.parametrize("value", [0, 2, 100, True, None])
def test_another_number_of_layers_is_refused(
    draft_folder: Path, registry: Registry, tmp_path: Path, value: Any
) -> None:
    """Where a format says the number twice, too."""
    config = json.loads((draft_folder / "config.json").read_text()) | {"num_hidden_layers": value}
    with pytest.raises(CheckpointError):
        _open(_with(draft_folder, tmp_path / "draft", json.dumps(config)), registry)


SENSELESS = {
    "markov_rank": [10**9, True],
    "block_size": [True, 10**9],
    "num_hidden_layers": [10**5],
    "draft_num_hidden_layers": [10**5],
    "num_target_layers": [10**9],
    "vocab_size": [10**10],
    "hidden_size": [10**8],
    "head_dim": [10**9],
    "intermediate_size": [10**12],
    "target_layer_ids": ["12", [True], []],
}
_LIMITED = """
import resource, sys
from pathlib import Path
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.errors import DeepSpecError
from deepspec_core.plugins.discovery import load_plugins

registry = load_plugins().registry
count, *folders = sys.argv[1:]
good, others = map(Path, folders[: int(count)]), map(Path, folders[int(count) :])
for folder in good:
    load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for folder in others:
    try:
        load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
        print(folder.name, "loaded")
    except DeepSpecError as error:
        print(folder.name, "refused", " ".join(error.render().split()))
"""


@pytest.mark.slow
def test_sizes_are_compared_before_memory_is_taken(draft_folders: dict[str, Path], tmp_path: Path) -> None:
    """In one process for the drafts of all algorithms: most of its time is its imports."""
    cases: dict[str, Path] = {}
    for algorithm, folder in draft_folders.items():
        config, before = json.loads((folder / "config.json").read_text()), len(cases)
        for key, values in SENSELESS.items():
            for number, value in enumerate(values if key in config else []):
                name = f"{algorithm}-{key}-{number}"
                cases[name] = _with(folder, tmp_path / name, json.dumps(config | {key: value}))
        assert len(cases) >= before + 9
    begin = time.monotonic()
    folders = map(str, [*draft_folders.values(), *cases.values()])
    command = [sys.executable, "-c", _LIMITED, str(len(draft_folders)), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said.keys() == cases.keys()
    for name, text in said.items():
        assert text.startswith("refused"), name
        assert str(cases[name]) in text
        assert "emory" not in text, text


def _longer_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)


def _shorter_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [_longer_header, _shorter_data, lambda path: path.write_bytes(b"")])
def test_a_file_of_weights_that_lies_is_refused(
    draft_folder: Path, registry: Registry, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((draft_folder / name).read_bytes())
    damage(folder / "model.safetensors")
    for use in (_open, lambda folder, registry: inspect_draft(folder, registry=registry)):
        with pytest.raises(CheckpointError, match="weights cannot be read"):
            use(folder, registry)
