"""What files that a run file names say against it: the target's config.json, a chat template of the user's own, and
the folder into which servers write.

Reads them where they lie on this machine, and asks no Hub. Knows the keys for positions that all configs share. The
target's family, which imports PyTorch, decides before a run (RunData.check_length).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import BUILTIN
from deepspec_core.disk import is_folder
from deepspec_core.errors import ConfigError, DeepSpecError, TargetError
from deepspec_core.json_files import read_object
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.chat_template import read_chat_template


def problems_of_named_files(file: RunFile, base: Path, registry: Registry) -> Iterator[DeepSpecError]:
    """Every one of them. `base` is the folder that relative paths start at."""
    template, model = file.target.chat_template, file.target.model
    if template is not None:
        try:
            read_chat_template(base / template)
        except DeepSpecError as error:
            yield error
    exchange = file.features.exchange
    if exchange is not None and {"cache", "train"} & set(file.run.stages) and not is_folder(base / exchange):
        yield no_exchange(str(base / exchange), where="features.exchange")
    if not {"regenerate", "cache", "train"} & set(file.run.stages):
        return
    local = model.startswith(BUILTIN)
    folder = registry.load("builtin", model.removeprefix(BUILTIN))() if local else base / Path(model).expanduser()
    if not (Path(folder) / "config.json").is_file():
        return
    try:
        most = most_positions(read_object(Path(folder) / "config.json", kind=TargetError, strict=False))
    except TargetError as error:
        yield error
        return
    if most is not None and file.data.max_length > most:
        yield too_long(file.data.max_length, most, model, where="data.max_length")


def no_exchange(found: str, *, where: str) -> ConfigError:
    """The error for a folder that servers cannot write to, or that is not there."""
    return ConfigError(
        "The exchange folder cannot be used",
        where=where,
        found=found,
        expected="a folder that the servers and this run can both write to, under the same path",
        fix="Make the folder, or mount it here.",
    )


def too_long(asked: int, most: int, model: str, *, where: str) -> ConfigError:
    """The error for samples longer than the target has positions: it was never trained for what comes after them."""
    return ConfigError(
        "samples could be longer than the target's number of positions",
        where=where,
        found=f"{asked:,}",
        expected=f"at most {most:,}, the number of positions of {model}",
        fix=f"Set data.max_length = {most}.",
    )


def most_positions(config: Mapping[str, Any]) -> int | None:
    """The most positions that a target with this config.json can have, however its embedding is stretched.

    None where the file does not say it.
    """
    part = config.get("text_config")
    text = part if isinstance(part, Mapping) else config
    if type(text.get("max_position_embeddings")) is not int:
        return None
    numbers, factors = [text["max_position_embeddings"]], [1]
    for key in ("rope_parameters", "rope_scaling"):
        for entry in _entries(text.get(key)):
            numbers += _numbers(entry.get("original_max_position_embeddings"))
            factors += _numbers(entry.get("factor"))
    return int(max(numbers) * max(factors))


def _numbers(value: Any) -> list[Any]:
    return [value] if type(value) in (int, float) and 0 < value < 2**62 else []


def _entries(value: object) -> Iterator[Mapping[str, Any]]:
    """Rotary parameters for all layers, and those by layer type."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _entries(inner)
