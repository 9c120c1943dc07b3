"""The contents of `deepspec data show`: samples as training reads them, prompts as they are sent, and dropped
conversations.

Needs the tokenizer and the target's config, never its weights. Knows where a run's conversations are. Does not know how
they are printed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from attrs import field, frozen

from deepspec_core.config.schema import HELD_OUT
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.answers import TemplateRefusal
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.split import Split
from deepspec_core.data.tokenize import ChatTokenizer, Dropped
from deepspec_core.data.unicode_text import printable
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.json_lines import read_json_lines
from deepspec_core.pipeline.run import Run


@frozen(kw_only=True)
class Shown:
    """A sample or a prompt: its text, cut where supervision begins or ends, and the number of tokens of each part."""

    id: str
    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    supervised: int
    is_prompt: bool
    cut: bool = False


@frozen(kw_only=True)
class View:
    """What is shown of a run. `origin` says in words where it comes from. `counts` grow while `shown` is read."""

    origin: str
    shown: Iterator[Shown]
    counts: Counter[str] = field(factory=Counter)
    failures: tuple[str, ...] = ()


def view(run: Run, split: Split, count: int, *, on_drop: Callable[[Dropped], None]) -> View:
    """The first `count` samples of a split.

    For "train" these are the samples that training reads, or the prompts of regeneration if the target has not answered
    yet. For "held_out" they are the prompts of evaluation.
    """
    run.data.check_length()
    counts: Counter[str] = Counter()
    bad_rows = BadRows(tell=lambda bad: on_drop(Dropped(id=bad.where, reason=bad.reason)))
    if split == "held_out":
        return View(origin="held-out prompts, as evaluation asks them", shown=_held_out(run, count), counts=counts)
    regenerated = run.data.regenerated
    if regenerated is not None and not regenerated.exists():
        prompts = (
            shown
            for row in run.data.conversations("train", counts, bad_rows)
            if (shown := _first_prompt(run, row, on_drop))
        )
        origin = "prompts of data.sources, as regeneration asks them (nothing is regenerated yet)"
        return View(origin=origin, shown=islice(prompts, count), counts=counts)
    samples = run.data.tokenized(run.data.training_conversations(counts, bad_rows), counts, on_drop)
    longest = run.data.max_length
    return View(
        origin=f"samples of {regenerated or 'data.sources'}",
        shown=islice((_sample(run.target.tokenizer, sample, longest) for sample in samples), count),
        counts=counts,
        failures=() if regenerated is None else _failures(regenerated),
    )


def _held_out(run: Run, count: int) -> Iterator[Shown]:
    prompts = load_task(
        HELD_OUT,
        limit=count,
        seed=run.file.evaluate.seed,
        base=run.base,
        registry=run.plugins.registry,
        held_out=lambda: run.data.held_out(count),
    )
    for prompt in prompts:
        ids = run.target.tokenizer.render_prompt(prompt.messages, run.file.data.system_prompt, prompt.tools)
        yield _prompt(run, prompt.id, ids)


def _first_prompt(run: Run, row: Conversation, on_drop: Callable[[Dropped], None]) -> Shown | None:
    """The first prompt that the target is asked; None if there is none, or regeneration cannot ask it."""
    asked = next((index for index, message in enumerate(row.messages) if message["role"] == "user"), None)
    if asked is None:
        return None
    said = [message for message in row.messages[: asked + 1] if message["role"] != "assistant"]
    try:
        ids = run.target.tokenizer.render_prompt(said, run.file.data.system_prompt, row.tools)
    except TemplateRefusal as error:
        on_drop(Dropped(id=printable(row.id), reason=f"{error.problem}: {error.found}"))
        return None
    return _prompt(run, row.id, ids)


def _prompt(run: Run, identity: str, ids: tuple[int, ...]) -> Shown:
    text = run.target.tokenizer.decode(ids)
    return Shown(id=identity, pieces=((text, False),), tokens=len(ids), supervised=0, is_prompt=True)


def _sample(tokenizer: ChatTokenizer, sample: Sample, longest: int) -> Shown:
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return Shown(
        id=sample.id,
        pieces=tuple((tokenizer.decode(tokens), flag) for flag, tokens in runs),
        tokens=len(sample.input_ids),
        supervised=int(sample.loss_mask.sum()),
        is_prompt=False,
        cut=sample.original_length == longest,
    )


def _failures(regenerated: Path) -> tuple[str, ...]:
    """The conversations that regeneration gave up on, one line each, with id and reason."""
    path = regenerated.with_name(regenerated.name + ".failures.jsonl")
    if not path.exists():
        return ()
    return tuple(f"{row['id']}: {row['reason']}" for _, row in read_json_lines(path))
