"""The text of a new run file: every section, the keys that people change, and comments that explain their values.

pipeline/starting.py gathers the facts about target and draft; this file writes them as TOML. Opens nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import NOTHING, asdict, fields, frozen, has

from deepspec_core.config.reference import about, meanings
from deepspec_core.config.schema import (
    CacheOptions,
    DataOptions,
    EvaluateOptions,
    RegenerateOptions,
    RunOptions,
    SourceOptions,
    TrainOptions,
)
from deepspec_core.config.toml_values import toml, toml_key

_WIDTH = 116
_COMMENT_AT = 36
_LOSS_NOTE = "The algorithm's default loss; for other terms see `deepspec plugins`."


@frozen(kw_only=True)
class Start:
    """The facts for a run file. `notes`, by section or key, are sentences that become comments.

    `option_values` replace the draft type's defaults, `train` those of [train]; `loss` is the whole section. A draft
    that is not `trained` has no taps, and its file only the sections that evaluation reads.
    """

    name: str
    model: str
    data: str
    draft_type: str
    taps: tuple[int, ...]
    max_length: int
    sampling: Mapping[str, float]
    options: type[Any]
    option_values: Mapping[str, Any]
    layer: Mapping[str, int | str]
    loss: Mapping[str, Any]
    train: Mapping[str, Any]
    notes: Mapping[str, Sequence[str]]
    trained: bool = True
    recommended: bool = False


def starter(start: Start) -> str:
    """The whole file."""
    before = [
        _section("run", _run(start)),
        _section("target", _target(start)),
        _section("data", _data(start), start.notes.get("data", ())),
    ]
    draft = _section("draft", _draft(start), [*start.notes.get("draft", ()), about(start.options)])
    training = [
        _section(
            "regenerate", _regenerate(start), ["The target answers the prompts of the conversations, turn by turn."]
        ),
        _section("features", [_line("mode", "online", 'the target runs beside the draft; "cached" stores features')]),
        _section("cache", _cache(), start.notes.get("cache", ())),
        draft,
        *([_section("draft.layer", _layer(start), start.notes.get("draft.layer", ()))] if start.layer else []),
        _section("loss", _loss(start), start.notes.get("loss", [_LOSS_NOTE])),
        _section("train", _train(start)),
    ]
    evaluate = _section(
        "evaluate",
        _evaluate(start),
        ["Speculative decoding with draft and target, beside the target's plain decoding."],
    )
    sections = [*before, *(training if start.trained else [draft]), evaluate]
    head = [
        f"A draft of type {start.draft_type} for {start.model}, written by `deepspec init`. Check "
        f"it, look at the data, try it, run it:",
        "  deepspec config check FILE;  deepspec data show FILE;  deepspec run FILE --smoke;  deepspec run FILE",
    ]
    return "\n".join(["\n".join(f"# {line}" for line in head), *sections]) + "\n"


def _section(name: str, lines: Sequence[str], notes: Sequence[str] = ()) -> str:
    return "\n".join(["", f"[{name}]", *_comments(notes), *lines])


def _comments(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield from (f"# {line}" for line in textwrap.wrap(note, _WIDTH))


def _line(key: str, value: Any, comment: str = "", *, written: bool = True) -> str:
    line = f"{'' if written else '# '}{toml_key(key)} = {toml(value)}"
    return f"{line.ljust(_COMMENT_AT)}  # {comment}" if comment else line


def _defaults(section: type[Any], comments: Mapping[str, str], instead: Mapping[str, Any] = {}) -> list[str]:
    """The keys named in `comments`, in their order, with the schema's own defaults or what is given `instead`."""
    known = {**{attribute.name: attribute.default for attribute in fields(section)}, **instead}
    return [_line(key, known[key], comment) for key, comment in comments.items()]


def _run(start: Start) -> list[str]:
    stages = (
        _line("stages", ("regenerate", "train", "evaluate"), 'with features.mode = "cached": "cache" before "train"')
        if start.trained
        else _line("stages", ("evaluate",), "this draft is not trained")
    )
    return [
        _line("name", start.name),
        _line("output", f"runs/{start.name}", "relative to this file, like every path here"),
        stages,
        *_defaults(RunOptions, {"seed": ""}),
    ]


def _target(start: Start) -> list[str]:
    layers = [*_comments(start.notes.get("layers", ())), _line("layers", start.taps)]
    return [
        _line("model", start.model),
        *(layers if start.trained else []),
        _line("dtype", "bfloat16", "left out: float32 on a CPU, where results are exact, else bfloat16", written=False),
        *_comments(start.notes.get("target", ())),
    ]


def _data(start: Start) -> list[str]:
    source = {"path": start.data, "weight": SourceOptions(path="").weight}
    prompt = _line(
        "system_prompt", "You are a helpful assistant.", "none if left out; also used in evaluation", written=False
    )
    lines = [
        "# Files of JSON lines with `messages`, or datasets on the Hub; `limit = 1000` takes that many.",
        _line("sources", [source]),
        *_defaults(DataOptions, {"held_out": "this share is kept for evaluation"}),
        prompt,
    ]
    if not start.trained:
        return lines
    return [
        *lines,
        _line("max_length", start.max_length, "tokens; longer conversations are cut"),
        *_defaults(
            DataOptions,
            {
                "min_supervised_tokens": "samples with fewer are dropped, and counted",
                "supervise": '"all" answers of a conversation, or the "last" alone',
                "supervise_newline": "without regeneration: also supervise the newline after an answer",
                "supervise_think_block": "and the think block that the template puts before it",
            },
        ),
    ]


def _regenerate(start: Start) -> list[str]:
    advised = "as the target's makers advise"
    sampling = [_line(key, value, advised) for key, value in start.sampling.items()]
    return [
        *_defaults(RegenerateOptions, {"thinking": ""}),
        _line("max_tokens", min(start.max_length, RegenerateOptions().max_tokens), "new tokens of one answer"),
        *sampling,
        *_defaults(
            RegenerateOptions,
            {"batch_size": "conversations at once", "max_failures": "a larger share of failures stops the run"},
        ),
    ]


def _cache() -> list[str]:
    return _defaults(CacheOptions, {"format": "", "dtype": '"float8_e4m3" takes about half the space of bfloat16'})


def _draft(start: Start) -> list[str]:
    lines, said = [_line("type", start.draft_type)], meanings(start.options)
    for attribute in fields(start.options):
        name = attribute.name
        value = start.option_values.get(name, _default_of(attribute))
        inside = meanings(type(value)) if has(type(value)) else {}
        lines += _comments([said.get(name, ""), *(f"{key}: {meaning}" for key, meaning in inside.items())])
        if value is NOTHING:
            lines.append(f"# {name}: is required and has no default")
        elif value is None:
            lines.append(f"# {name}: left out")
        else:
            notes = start.notes.get(f"draft.{name}", ())
            lines += [*_comments(notes), _line(name, asdict(value) if has(type(value)) else value)]
    return lines


def _default_of(attribute: Any) -> Any:
    factory = getattr(attribute.default, "factory", None)
    return attribute.default if factory is None else factory()


def _layer(start: Start) -> list[str]:
    return [_line(key, value) for key, value in start.layer.items()]


def _loss(start: Start) -> list[str]:
    loss = {"terms": {"ce": 1.0}, "weighting": {"type": "uniform"}, **start.loss}
    return [_line(key, value) for key, value in loss.items()]


def _train(start: Start) -> list[str]:
    """The keys that people change, and those that a recipe sets."""
    comments = {
        "lr": "" if start.recommended else "this section is the published recipe",
        **dict.fromkeys(start.train, ""),
        "global_batch_size": "sequences a step, over all devices",
        "micro_batch_size": "sequences at once on one device: more is faster, and takes more memory",
        "epochs": "",
        "warmup": "share of the steps; then cosine to 0",
        "weight_decay": "",
        "clip_norm": "",
        "precision": '"float32" where results are to be exact',
        "checkpoint_every": "steps",
        "log_every": "steps",
    }
    return _defaults(TrainOptions, comments, start.train)


def _evaluate(start: Start) -> list[str]:
    known = {attribute.name: attribute.default for attribute in fields(EvaluateOptions)}
    return [
        _line("tasks", known["tasks"], "prompts the run never trained on; or JSON-lines files with `turns`"),
        _line("temperature", known["temperature"]),
        _line("max_new_tokens", min(start.max_length, EvaluateOptions().max_new_tokens)),
        *_defaults(EvaluateOptions, {"batch_size": "sequences at once", "plain": "also without the draft", "seed": ""}),
        _line("limit", 100, "prompts of a task; left out: all of it, of held-out prompts 500", written=False),
    ]
