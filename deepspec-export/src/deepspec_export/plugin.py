"""What this package offers: formats for serving engines, one for each pair of format and algorithm.

Imports attrs and core's records only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspec_core.plugins import ExportSpec, hookimpl

_FORMATS = {
    "deepspec": "the published layout, to be moved or uploaded, with a model card",
    "vllm": "vLLM's own format; --speculative-config names the folder",
    "sglang": "SGLang's format; --speculative-draft-model-path names the folder",
    "speculators": "the speculators package's format, which vLLM reads",
    "gguf": "llama.cpp's format; llama-server -md names the file",
    "z-lab": "z-lab's own layout of DFlash, which vLLM and SGLang read",
}
_MODULES = {"deepspec": "published_layout", "gguf": "gguf_exporter"}
_ALGORITHMS = ("eagle3", "dflash", "dspark")
_OF_ONE = {"z-lab": ("dflash",)}


@hookimpl
def deepspec_exporters() -> Iterable[ExportSpec]:
    """The formats."""
    return [
        ExportSpec(
            name=name,
            summary=summary,
            build=f"deepspec_export.{_MODULES.get(name, 'exporter')}:{name.replace('-', '_')}_exporter",
            algorithm=algorithm,
        )
        for name, summary in _FORMATS.items()
        for algorithm in _OF_ONE.get(name, _ALGORITHMS)
    ]


@hookimpl
def deepspec_commands(cli: Any) -> None:
    """`deepspec import`."""
    from deepspec_export.import_command import import_command

    cli.add_command(import_command)
