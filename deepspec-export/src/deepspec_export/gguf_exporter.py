"""The format `gguf`: one file for llama.cpp's server, its card and its record.

Knows the steps, and that the file needs the package `gguf` and the target's tokenizer, which no other format does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts
from deepspec_core.errors import ExportError
from deepspec_export import gguf_file, gguf_tokenizer, llama_cpp
from deepspec_export.card import card
from deepspec_export.exporter import export_weights, shared_notes
from deepspec_export.record import CARD, RECORD, record, write_json
from deepspec_export.served import draft_as_served
from deepspec_export.verification import refuse_paths, verify_file

FILE: Final = "draft.gguf"


class GgufExporter:
    """A contracts.export.Exporter of GGUF."""

    def unservable(self, facts: ExportFacts) -> str | None:
        """Why llama.cpp cannot serve the draft, and what to do; or None.

        ExportError where no file can be written here: without the package gguf, or without the target's place.
        TargetError where the target's tokenizer cannot be loaded.
        """
        if reason := llama_cpp.unservable(facts):
            return reason
        if not gguf_file.is_installed():
            raise _unwritable("the package gguf", gguf_file.MISSING, gguf_file.INSTALL)
        if facts.tokenizer is None:
            found = "the file holds the target's tokens, and nothing says where the target is"
            raise _unwritable("the draft's target", found, "Name its folder, or its Hub id, in --target.")
        return gguf_tokenizer.unwritable(facts.tokenizer())

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> None:
        """Write draft.gguf, export.json and README.md.

        ExportError where a number is not finite, or what was written is not what the draft is.
        """
        assert facts.tokenizer is not None, "a draft without one is refused"
        tokenizer = facts.tokenizer()
        served = draft_as_served(facts)
        stored = llama_cpp.as_written(served)
        weights = llama_cpp.prepared(export_weights(draft, served, facts, whole=False), served)
        spoken = gguf_tokenizer.keys(tokenizer, served.vocab_size)
        keys = llama_cpp.fields(stored, facts) | spoken
        path = out / FILE
        gguf_file.write(path, llama_cpp.architecture(stored), keys, llama_cpp.named(weights, stored))
        name, found_keys, found_tensors = gguf_file.read(path)
        found = llama_cpp.read(name, found_keys, found_tensors)
        tensors = llama_cpp.published(found_tensors, found)
        verified = verify_file(path, found, tensors, expected=stored, written=weights, draft=draft)
        differing = sorted(key for key, value in spoken.items() if found_keys.get(key) != value)
        assert not differing, f"keys of the tokenizer are read back as they were written, but for {differing}"
        notes = [*shared_notes(served, facts), *llama_cpp.notes(served), *_tokenizer_notes(tokenizer)]
        command = llama_cpp.command(served, target=llama_cpp.TARGET, draft="DIR")
        (out / CARD).write_text(
            card(facts, format_name=llama_cpp.NAME, commands=[command], notes=notes), encoding="utf-8"
        )
        content = record(facts, llama_cpp.NAME, llama_cpp.WRITTEN_FOR, out, [FILE])
        content |= {
            "served_as": {"method": served.method, "num_speculative_tokens": served.proposes},
            "notes": notes,
            "verified": verified.as_json() | {"tokens": len(found_keys["tokenizer.ggml.tokens"])},
            "not_verified": "No engine was started. The file was read back with the package gguf and replayed by "
            "deepspec-export, by the rules of the engine named under written_for.",
        }
        write_json(out / RECORD, content)
        refuse_paths(out)


def _unwritable(where: str, found: str, fix: str) -> ExportError:
    return ExportError(f"the draft cannot be exported to {llama_cpp.NAME}", where=where, found=found, fix=fix)


def gguf_exporter() -> GgufExporter:
    """The format `gguf`."""
    return GgufExporter()


def _tokenizer_notes(tokenizer: object) -> list[str]:
    if gguf_tokenizer.split_name(tokenizer) != gguf_tokenizer.DEFAULT:
        return []
    return [
        "How the target's tokenizer splits text has no name that is known here, so the file says "
        f"`{gguf_tokenizer.DEFAULT}`. llama.cpp splits text by the target's own file, and never by a draft's."
    ]
