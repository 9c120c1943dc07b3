"""The servers of a run that regenerates through them: makes a farm (servers/farm.py) from the run file.

Knows [regenerate] and the run's target, and which stages use servers; does not know the servers' protocol.
"""

from __future__ import annotations

import os
from typing import Any

from deepspec_core.config.schema import SERVER
from deepspec_core.data.regenerate import sampling_of
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import ConfigError
from deepspec_core.pipeline.run import Run
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.wanted import Wanted


def farm_of(run: Run) -> Farm:
    """The run's servers, nobody asked yet. Raises ConfigError if their key is not in the environment."""
    options = run.file.regenerate
    wanted = wanted_of_target(
        run,
        served_as=options.served_as,
        sampling=sampling_of(options, run.target.family.conversation_format().sampling),
        max_tokens=options.max_tokens,
        max_length=run.data.max_length,
        key=key_in(options.api_key_env, where=f"{run.path}: regenerate.api_key_env"),
        timeout=options.timeout,
        max_concurrency=options.max_concurrency,
    )
    return Farm(addresses=options.servers, work=Answering(wanted))


def wanted_of_target(run: Run, *, served_as: str | None, **limits: Any) -> Wanted:
    """What is wanted of servers of the run's target. `served_as` is the servers' name of it, if it is another one.

    `limits` are the members of Wanted that are no facts of the target.
    """
    target, stop_ids = run.target, tuple(run.target.architecture.stop_token_ids)
    names = tuple(dict.fromkeys((run.file.target.model, str(target.where))))
    return Wanted(
        names=names if served_as is None else (served_as,),
        tokenizer=target.tokenizer,
        vocab_size=target.architecture.vocab_size,
        stop_ids=stop_ids,
        end_id=end_of(target.tokenizer, stop_ids),
        **limits,
    )


def uses_servers(run: Run, stage: str) -> bool:
    """Whether a stage takes features from servers: training by its mode, the cache stage if there are any."""
    if stage == "train":
        return run.file.features.mode == SERVER
    return stage == "cache" and bool(run.file.features.servers)


def end_of(tokenizer: ChatTokenizer, stop_ids: tuple[int, ...]) -> int:
    """The stop token that the chat template itself ends answers with."""
    written = tokenizer.control_token_ids()
    return next((token for token in stop_ids if token in written), stop_ids[0])


def key_in(name: str | None, *, where: str) -> str | None:
    """The key in the environment variable of this name. Raises ConfigError if it is missing or not a valid key."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            "The servers' API key is not in the environment",
            where=where,
            found=f"{name} is {'not a key' if key else 'not set, or empty'}",
            fix=f"Set {name}, or remove {where.rpartition(' ')[2]}.",
        )
    return key
