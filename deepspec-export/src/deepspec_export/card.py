"""The model card of an export, README.md: what the draft is, how it came about, what it is worth, how to serve it.

Knows what people want to read of a draft; not how an export is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec_core.contracts.export import ExportFacts

# Sources have a row of their own; a system prompt is text of any kind and length.
_NOT_SHOWN = ("sources", "system_prompt")
_BUILTIN = "builtin:"
_UNTRAINED = (
    "**The weights are random: this draft was not trained.** It is there to be loaded, so that serving can be set up "
    "before there is a draft. It speeds nothing up.\n"
)
_TITLES = {"eagle3": "Eagle3", "dflash": "DFlash", "dspark": "DSpark"}


def card(facts: ExportFacts, *, format_name: str, commands: Sequence[str], notes: Sequence[str]) -> str:
    """The text of README.md. `commands`: a line for each engine that serves the folder."""
    description = facts.description
    title = _TITLES.get(description.algorithm, description.algorithm)
    target = "its target" if facts.target is None else facts.target.name
    trained = "with untrained weights, made with DeepSpec" if facts.untrained else "trained with DeepSpec"
    parts = [
        f"# {title} draft for {target}\n",
        *([_UNTRAINED] if facts.untrained else []),
        f"A draft model for speculative decoding, {trained}, in the format `{format_name}`. It proposes up "
        f"to {description.max_tokens} tokens a round from the outputs of the target's decoder layers "
        f"{', '.join(map(str, description.taps))} (counted from 0). `export.json` says what was checked.\n",
        "## Serve it\n",
        "```sh\n" + "\n".join(commands) + "\n```\n",
    ]
    if facts.target is not None and facts.target.local:
        parts.append(f"`{target}` was a local directory when the draft was trained: put its path in its place.\n")
    if target.startswith(_BUILTIN):
        parts.append(f"DeepSpec ships `{target}`: give the folder of its files in its place.\n")
    parts += [f"{note}\n" for note in notes]
    parts += ["## Accepted length\n", _results(facts.results), *_reduced(facts.reduced)]
    parts += ["## How it was made\n", _settings(facts)]
    return "\n".join(parts).rstrip() + "\n"


def _results(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Not measured where this export was made.\n"
    lines = ["| task | temperature | prompts | accepted length (95% interval) |", "|---|---|---|---|"]
    for result in results:
        lines.append(
            f"| {_cell(result['task'])} | {result['temperature']:g} | {result['samples']} | "
            f"{_length(result['acceptance_length'], result['acceptance_length_interval'])} |"
        )
    lines.append("\nTokens a round commits, the target's own included, pooled over rounds, as DeepSpec decodes.\n")
    return "\n".join(lines)


def _reduced(reduced: Mapping[str, Any]) -> list[str]:
    if not reduced:
        return []
    measured = reduced["measured"]
    before = _length(measured["accepted_length_before"], measured["interval_before"])
    after = _length(measured["accepted_length_after"], measured["interval_after"])
    return [
        f"The vocabulary was reduced to {reduced['tokens']:,} of {reduced['of']:,} tokens after training, which are "
        f"{100 * reduced['covered']:.2f}% of the answers' tokens. On {measured['prompts']} prompts of "
        f"{measured['task']}, greedily, the accepted length was {before} before and {after} after.\n"
    ]


def _length(length: float | None, interval: Sequence[float] | None) -> str:
    """An accepted length with its interval; a dash where there was no round."""
    if length is None or interval is None:
        return "-"
    low, high = interval
    return f"{length:.2f} ({low:.2f}-{high:.2f})"


def _settings(facts: ExportFacts) -> str:
    description = facts.description
    rows = [
        ("target", "not known" if facts.target is None else _cell(facts.target.name)),
        ("draft layers", str(description.num_layers)),
        ("window", "the whole context" if description.window is None else f"{description.window} positions"),
    ]
    data = facts.settings.get("data", {})
    if sources := data.get("sources"):
        rows.append(("data", ", ".join(_source(source) for source in sources)))
    for section in ("data", "draft", "loss", "train"):
        for key, value in facts.settings.get(section, {}).items():
            if key not in _NOT_SHOWN and value not in (None, {}, [], ""):
                rows.append((f"{section}.{key}", f"`{_cell(value)}`"))
    if data.get("system_prompt"):
        rows.append(("system prompt", "one; the run file has it"))
    if not facts.settings:
        rows.append(("settings", "not known: no run file lay beside the checkpoint"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows) + "\n"


def _source(source: Mapping[str, Any]) -> str:
    limit = source.get("limit")
    return _cell(source["path"]) + (f" (at most {limit:,} conversations)" if limit else "")


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_cell(inner)}" for name, inner in value.items() if inner is not None)
    return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")
