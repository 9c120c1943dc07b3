"""Whether the keys of [features] that are about servers go together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepspec_core.config.addresses import place
from deepspec_core.config.features_options import CACHED, ONLINE, SERVER, FeaturesOptions
from deepspec_core.config.paths import no_path
from deepspec_core.config.schema import RegenerateOptions, RunOptions
from deepspec_core.errors import ConfigError


def served_mistakes(
    features: FeaturesOptions, run: RunOptions, folder: Path, regenerate: RegenerateOptions | None
) -> Iterator[ConfigError]:
    """Every misfit. `folder` is the run file's; `regenerate` is None where that section has errors of its own."""
    asks = (features.mode == SERVER and "train" in run.stages) or (features.mode == CACHED and bool(features.servers))
    if features.mode == SERVER and "train" in run.stages and not features.servers:
        yield ConfigError(
            "features come from servers, but no server is named",
            where="features.servers",
            found="[]",
            expected='the address of at least one, such as "http://host:8000/v1"',
            fix="Start a server with `deepspec serve`, and add its address.",
        )
    if asks and features.exchange is None:
        yield ConfigError(
            "servers write features into a folder, but no folder is named",
            where="features.exchange",
            found="nothing",
            expected="a folder that the servers and this run both see under the same path",
            fix="For servers on this machine, name a folder in /dev/shm; for others, one on a shared file system.",
        )
    elif features.exchange is not None:
        problem = no_path("features.exchange", features.exchange, base=folder)
        if problem is not None:
            yield problem
    if features.mode == ONLINE and features.servers:
        yield ConfigError(
            "no stage would use these servers, because the target runs beside the draft",
            where="features.servers",
            found=f'{len(features.servers)}, with features.mode = "{ONLINE}"',
            expected=f'features.mode = "{SERVER}", or "{CACHED}" for a cache stage that uses them',
            fix=f'Set features.mode = "{SERVER}", or remove the servers.',
        )
    if regenerate is not None and regenerate.features:
        yield from _one_pass_mistakes(features, run, regenerate)
    elif asks and regenerate is not None and "regenerate" in run.stages:
        answering = {place(server) for server in regenerate.servers}
        both = [server for server in features.servers if place(server) in answering]
        if both:
            yield ConfigError(
                "these servers would also write the features of every answer, and nobody would "
                "read or remove the files",
                where="features.servers",
                found=f"{', '.join(both)}, also in regenerate.servers",
                expected="other servers than those of regenerate.servers",
                fix="Set regenerate.features = true, so that the cache stage takes these features; or start "
                "servers without features for regenerate.servers, for instance with `vllm serve`.",
            )


def _one_pass_mistakes(
    features: FeaturesOptions, run: RunOptions, regenerate: RegenerateOptions
) -> Iterator[ConfigError]:
    """What keeps answers and features from coming in one pass, or from being of use."""
    if not {"regenerate", "cache"} <= set(run.stages) or features.mode != CACHED or not features.servers:
        yield ConfigError(
            "no stage would use the features that are received with answers",
            where="regenerate.features",
            found=f'true, with run.stages = {list(run.stages)}, features.mode = "{features.mode}" and '
            f"{len(features.servers)} features.servers",
            expected=f'the stages "regenerate" and "cache", features.mode = "{CACHED}", and features.servers',
            fix="Set these keys, or remove regenerate.features.",
        )
    elif not regenerate.servers:
        yield ConfigError(
            "answers that are generated in this process come without features",
            where="regenerate.features",
            found="true, without regenerate.servers",
            expected="regenerate.servers, each of which is in features.servers too",
            fix="Name the servers, or remove regenerate.features.",
        )
    else:
        giving = {place(server) for server in features.servers}
        others = [server for server in regenerate.servers if place(server) not in giving]
        if others:
            yield ConfigError(
                "a server of regenerate.servers is not among features.servers",
                where="regenerate.servers",
                found=", ".join(others),
                expected="servers of features.servers, since regenerate.features = true",
                fix="Add it to features.servers, or remove it from regenerate.servers.",
            )
