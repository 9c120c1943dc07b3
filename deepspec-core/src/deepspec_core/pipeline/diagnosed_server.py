"""The rounds of a served draft, for a diagnosis: a running server answers the evaluation's prompts, and its counters
are read.

Knows runs and servers. diagnosing.py compares the counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.diagnosis.outcomes import Outcomes
from deepspec_core.diagnosis.served import outcomes_of_counts
from deepspec_core.pipeline.asking_server import address_of, wanted_of
from deepspec_core.pipeline.run import Run
from deepspec_core.servers.measuring import Measured, Server

_AT_ONCE = 4


@frozen(kw_only=True)
class Asked:
    """The command's options for the server: its address, its name of the target, and the variable of its key."""

    address: str
    served_as: str | None = None
    api_key_env: str | None = None


def ask(run: Run, requests: Sequence[Request], asked: Asked, *, max_new_tokens: int) -> tuple[Outcomes | None, str]:
    """The server's rounds on these requests, asked greedily; or None, and why they are not known.

    Raises ConfigError if it does not answer, or does not serve the run's target. Raises StageError if an answer cannot
    be used.
    """
    wanted = wanted_of(
        run,
        requests,
        sampling=Sampling(temperature=0.0),
        max_new_tokens=max_new_tokens,
        served_as=asked.served_as,
        api_key_env=asked.api_key_env,
    )
    with Server(address=address_of(asked.address), wanted=wanted) as server:
        found = server.measure(requests, at_once=_AT_ONCE, wanted=wanted, following=_no_turn, done=lambda: None)
        return _outcomes(found, server.engine.name)


def _outcomes(found: Measured, engine: str) -> tuple[Outcomes | None, str]:
    if found.tally is None:
        return None, f"somebody else asked {engine} too" if found.speculates else f"{engine} decodes without a draft"
    if found.tally.accepted_at is None:
        return None, f"{engine} counts no accepted tokens by position"
    return outcomes_of_counts(found.tally.rounds, found.tally.accepted_at), ""


def _no_turn(_identity: str, _answers: Sequence[Completion]) -> None:
    return None
