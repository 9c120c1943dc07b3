"""Whether the Hugging Face Hub can be reached, found out once and quickly.

Where it cannot, the libraries that fetch from it are put in their offline mode: they look into their local caches and
nowhere else, instead of trying again for half a minute for every file. Knows the connection; not what is fetched.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from attrs import define, field

log = logging.getLogger("deepspec")

ANSWER_WITHIN_SECONDS = 2.5
ASK_AGAIN_AFTER_SECONDS = 60.0
# Of its programming interface, and of its files: a file that is not there, which no Hub counts as a download.
_QUESTIONS = ("/api/models?limit=1", "/deepspec/none/resolve/main/none")
# A proxy that wants a password, and a Hub that wants to be asked less.
_NOT_NOW = (407, 429)


@define
class _Found:
    """When the Hub was last asked, why it did not answer, and whether offline mode is our doing."""

    at: float = float("-inf")
    problem: str | None = None
    switched_off: bool = False
    said: set[str] = field(factory=set)


_found = _Found()


def why_unreachable() -> str | None:
    """Why the Hub cannot be asked for anything now, None where it can be.

    Every Hub access of this package calls it first. An answer holds for a minute. Offline mode that the user asked for
    (HF_HUB_OFFLINE) is an answer, and nothing is asked then.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _found.switched_off:
        return "the Hub is not asked, since HF_HUB_OFFLINE is set, and there is no local copy"
    if time.monotonic() - _found.at > ASK_AGAIN_AFTER_SECONDS:
        if _found.switched_off:
            _switch(offline=False)
        _found.problem = _ask()
        _found.at = time.monotonic()
        if _found.problem is not None:
            _switch(offline=True)
    return _found.problem and f"the Hub cannot be reached ({_found.problem}), and there is no local copy"


def say_local_copy(of: str) -> None:
    """Tell once, where the Hub was found not to answer, that what was fetched before is used."""
    if _found.switched_off and of not in _found.said:
        _found.said.add(of)
        log.warning("the Hugging Face Hub cannot be reached: the local copy of %s is used", of)


def _ask() -> str | None:
    """Two small requests as a Hub answers them; what is wrong with an answer, None where nothing is."""
    from huggingface_hub import constants, get_session

    answers: list[str | None] = []

    def ask() -> None:
        try:
            for question in _QUESTIONS:
                answer = get_session().get(f"{constants.ENDPOINT}{question}", timeout=ANSWER_WITHIN_SECONDS)
                problem = _problem_with(answer.status_code, answer.headers, str(answer.url), constants.ENDPOINT)
                if problem is not None:
                    break
            answers.append(problem)
        except Exception as error:  # which depends on the HTTP library that huggingface_hub uses
            answers.append((str(error).splitlines() or [type(error).__name__])[0])

    # In a thread of its own, because looking up a name has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_WITHIN_SECONDS)
    return answers[0] if answers else f"no answer within {ANSWER_WITHIN_SECONDS:g} seconds"


def _problem_with(status: int, headers: Mapping[str, str], url: str, endpoint: str) -> str | None:
    """What says that this answer is not a working Hub's.

    Mirrors need not list models, and private ones want a token: an answer such as 401 or 404 is a Hub's.
    """
    location = headers.get("location", url) if 300 <= status < 400 else url
    host, asked = urlsplit(location).hostname, urlsplit(endpoint).hostname
    if host not in (None, asked):
        return f"{asked} sends to {host}, as networks do that want a login"
    if status >= 500 or status in _NOT_NOW:
        return f"{asked} answers {status}"
    if status == 200 and "json" not in headers.get("content-type", ""):
        return f"{asked} answers with a page, as networks do that want a login"
    return None


def _switch(*, offline: bool) -> None:
    """Offline mode of huggingface_hub, which transformers follows, and of datasets, which keeps its own copy of it."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.config.HF_DATASETS_OFFLINE = offline
    _found.switched_off = offline
