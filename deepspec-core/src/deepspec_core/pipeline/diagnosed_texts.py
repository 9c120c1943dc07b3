"""The texts on which a diagnosis measures a run's draft: training samples, held-out samples, the evaluation's prompts.

Knows a run's data, cache and target. Does not know drafts or acceptance. Nothing here refuses inputs that changed since
the run was made, because a diagnosis looks for such changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from attrs import evolve

from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.regenerate import sample_seed, sampling_of
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.diagnosis.prompt_check import (
    SAME,
    TEMPLATE,
    THINKING,
    PromptDifference,
    Trained,
    compare_prompt,
)
from deepspec_core.errors import DataError
from deepspec_core.features.cached import CachedFeatures
from deepspec_core.features.capture import capture
from deepspec_core.pipeline.evaluating import prompts_of, requests_of
from deepspec_core.pipeline.run import Run

_BATCH = 8
# Fields of a cache's header that identify the target of its features and its tokens.
_COMPARED = ("target", "revision", "taps", "hidden_size", "vocab_size", "tokenizer", "template")


def stored_samples(run: Run, most: int) -> tuple[list[Sample], CacheHeader]:
    """Samples of the run's cache with their features, evenly spread, and the cache's header.

    Raises CacheError without one.
    """
    reader = run.cache.part_of(run.cache.format.open(run.cache.folder, None))
    source = CachedFeatures(reader)
    return [source[index] for index in _spread(len(source), most)], reader.header


def online_samples(run: Run, most: int) -> list[Sample]:
    """Samples that training tokenises itself, without features."""
    samples = sorted(run.data.training_samples(), key=lambda sample: sample.id)
    return [samples[index] for index in _spread(len(samples), most)]


def with_live_features(run: Run, samples: Sequence[Sample], taps: Sequence[int]) -> list[Sample]:
    """The samples in their order, with features of these layers of the target as it is loaded now."""
    bare = [evolve(sample, features=None) for sample in samples]
    found = capture(bare, run.target.model, taps, batch_size=_BATCH)
    by_id = {sample.id: sample for sample in found}
    return [by_id[sample.id] for sample in samples]


def header_differences(run: Run, header: CacheHeader) -> dict[str, tuple[Any, Any]]:
    """The fields in which the cache's header differs from the one that the run would write now, with both values."""
    now = run.cache.header_of(header.source)
    pairs = {name: (getattr(header, name), getattr(now, name)) for name in _COMPARED}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def held_out_samples(run: Run, most: int) -> list[Sample]:
    """Texts of the kind that training reads, of conversations it never saw. Without features.

    If the run regenerates answers, the target answers now, sampled as there. Else they are the sources' own.
    """
    if run.data.regenerated is None:
        found = run.data.tokenized(run.data.conversations("held_out"), Counter())
        return [sample for sample, _ in zip(found, range(most), strict=False)]
    tokenizer, fmt = run.target.tokenizer, run.target.adapter.conversation_format()
    options, seed = run.file.regenerate, run.file.run.seed
    requests = [
        Request(
            id=row["id"],
            prompt_ids=tokenizer.render_prompt(_first_turn(row["messages"]), run.file.data.system_prompt, row["tools"]),
            seed=sample_seed(seed, row["id"]),
        )
        for row in run.data.held_out(most)
    ]
    sampling = sampling_of(options, fmt.sampling)
    return samples_of(
        answered(run, requests, sampling=sampling, max_new_tokens=options.max_tokens), run.data.max_length
    )


def asked_prompts(run: Run, most: int) -> list[Request]:
    """Evaluation's prompts, at most `most`: one of each task in turn, as long as it has any."""
    thinking, of_tasks = run.file.regenerate.thinking is True, list[Sequence[Request]]()
    for task in run.file.evaluate.tasks:
        if prompts := prompts_of(run, task)[:most]:
            of_tasks.append(requests_of(run, task, prompts, thinking=thinking)[0])
    dealt = [one for one in chain.from_iterable(zip_longest(*of_tasks)) if one is not None]
    return [evolve(one, id=f"{index} {one.id}") for index, one in enumerate(dealt[:most])]


def answered(
    run: Run, requests: Sequence[Request], *, sampling: Sampling, max_new_tokens: int, proposer: Any = None
) -> list[Completion]:
    """The completions in the order of their requests."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    done = decode(
        run.target.model,
        proposer,
        [request for request in requests if len(request.prompt_ids) < run.data.max_length],
        sampling=sampling,
        stop_ids=run.target.architecture.stop_token_ids,
        max_new_tokens=max_new_tokens,
        batch_size=_BATCH,
        max_length=min(run.target.architecture.max_positions, longest + max_new_tokens),
    )
    by_id = {completion.id: completion for completion in done}
    return [by_id[request.id] for request in requests if request.id in by_id]


def samples_of(completions: Sequence[Completion], max_length: int) -> list[Sample]:
    """Prompts with their answers, which are supervised. Those without a second answer token are left out."""
    found = []
    for done in completions:
        ids = torch.tensor([*done.prompt_ids, *done.output_ids][:max_length])
        mask = torch.arange(len(ids)) >= len(done.prompt_ids)
        if int(mask.sum()) > 1:
            found.append(Sample(id=done.id, input_ids=ids, loss_mask=mask, original_length=len(ids)))
    return found


def prompt_differences(run: Run, samples: Sequence[Sample]) -> list[PromptDifference]:
    """How evaluation's prompts differ from the training samples of the same conversations, at the first turn."""
    by_id = {sample.id: sample for sample in samples} | {sample.id.partition("#")[0]: sample for sample in samples}
    mode = run.file.regenerate.thinking
    tokenizer = run.target.tokenizer.in_mode(mode is True)
    header = run.target.adapter.conversation_format().assistant_start
    found = []
    for conversation in run.data.training_conversations():
        sample = by_id.get(conversation.id)
        if sample is None or not conversation.messages:
            continue
        one = _prompt_difference(run, conversation, sample, tokenizer, header)
        # A run that asks in both modes trains on both.
        found.append(evolve(one, kind=SAME) if one.kind == THINKING and not isinstance(mode, bool) else one)
        if len(found) == len(samples):
            break
    return found


def _prompt_difference(
    run: Run, conversation: Conversation, sample: Sample, tokenizer: ChatTokenizer, header: str
) -> PromptDifference:
    said, system, tools = _first_turn(conversation.messages), run.file.data.system_prompt, conversation.tools
    try:
        asked = tokenizer.render_prompt(said, system, tools)
        other = tokenizer.in_mode(not tokenizer.thinking).render_prompt(said, system, tools)
    except DataError as error:
        return PromptDifference(sample=sample.id, kind=TEMPLATE, says=f"Evaluation cannot ask it: {error.problem}.")
    unsupervised = int(sample.loss_mask.to(torch.int64).argmax())
    trained = Trained(sample=sample.id, ids=sample.input_ids.tolist(), prompt=unsupervised)
    return compare_prompt(trained, asked, other, tokenizer, header=header)


def _first_turn(messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Everything up to the first message of the user."""
    until = next((index + 1 for index, message in enumerate(messages) if message["role"] == "user"), None)
    return messages[:until]


def _spread(size: int, most: int) -> Iterator[int]:
    """Indices evenly spread over `size` entries, at most `most` of them."""
    return iter(sorted({round(index) for index in np.linspace(0, size - 1, min(size, most))}) if size else [])
