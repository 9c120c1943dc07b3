"""A trial of the cache format before a run's first stage: with a plugin's, small samples are written and read back.

Knows the contract of formats. The trial lies in a temporary folder; the run's own cache is not touched.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from deepspec_core.cache.storable import require_storable
from deepspec_core.contracts.cache import CacheFormat, CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import PluginError
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.records import CORE, canonical

# Tokens of each sample. They lie in two shards, so that a format which takes one for another is found out.
_LENGTHS = (3, 1, 2)
_IN_SHARD = 2
# The rounding of eight bits, beside the largest number of a token.
_TOLERANCE = 0.1
# Hidden states of the first tokens of a text are as large as this.
_LARGE = 2000.0


def try_format(run: Run) -> None:
    """Raise CacheError if the run's cache format cannot store cache.dtype, and PluginError if it does not give back
    what it was given. With core's own, a cache is only begun.
    """
    name, registry = run.file.cache.format, run.plugins.registry
    package = registry.provider("cache", name)
    if canonical(package) == CORE:
        require_storable(run.cache.format, run.cache.bare_header())
        return
    with registry.blaming("cache", name):
        problem = lost_by(run.cache.format, run.cache.bare_header())
    if problem is not None:
        raise PluginError(
            f"cache format {name!r} does not preserve a sample",
            where=package,
            found=problem,
            expected="the same sample when it is read back (contracts.cache.CacheFormat)",
        )


def lost_by(cache_format: CacheFormat, header: CacheHeader) -> str | None:
    """What is another after samples were written and read back, in words; None if all is as it was."""
    samples = [_sample(header, number, length) for number, length in enumerate(_LENGTHS)]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with closing(cache_format.create(path, header, shard_samples=_IN_SHARD)) as writer:
            if writer.written():
                return f"written() of a new cache: {writer.written()}"
            for sample in samples:
                writer.write(sample)
            writer.finish()
        if cache_format.header(path) != header:
            return f"header(): {cache_format.header(path)}"
        if errors := list(cache_format.verify(path)):
            return f"verify(): {errors[0]}"
        reader = cache_format.open(path, header)
        named = dict(zip(reader.ids(), reader.lengths(), strict=False))
        if len(reader) != len(samples) or named != {sample.id: len(sample.input_ids) for sample in samples}:
            return f"len, ids() and lengths(): {len(reader)}, {reader.ids()}, {reader.lengths()}"
        by_id = {sample.id: sample for sample in samples}
        for index, identity in enumerate(reader.ids()):
            sample, tokens = by_id[identity], reader.tokens_of(index)
            if tokens.features is not None or not torch.equal(tokens.input_ids, sample.input_ids):
                return f"tokens_of(): {tokens}"
            if (problem := _differs(reader[index], sample)) is not None:
                return problem
    size: Any = cache_format.bytes_per_token(header)
    return None if type(size) is int and size > 0 else f"bytes_per_token(): {size!r}"


def _sample(header: CacheHeader, number: int, length: int) -> Sample:
    # Eight-bit features are computed by the format from full precision.
    dtype = torch.float32 if header.dtype == "float8_e4m3" else torch_dtype(header.dtype)
    draw = torch.Generator().manual_seed(number)

    def drawn(width: int) -> Tensor:
        values: Tensor = torch.rand(length, width, generator=draw) * 2 - 1
        values[0] *= _LARGE
        return values.to(dtype)

    return Sample(
        id=f"trial {number}",
        # The ends of the vocabulary, and the longest text: a format may store them in too few bits.
        input_ids=torch.tensor([0, header.vocab_size - 1, header.vocab_size // 2][:length]),
        loss_mask=torch.arange(length) > 0,
        original_length=header.max_length,
        features=TargetFeatures(
            hidden=drawn(len(header.taps) * header.hidden_size), last_hidden=drawn(header.hidden_size)
        ),
    )


def _differs(found: Sample, sample: Sample) -> str | None:
    if found.id != sample.id or found.original_length != sample.original_length:
        return f"id {found.id!r}, original_length {found.original_length}"
    for field in ("input_ids", "loss_mask"):
        mine, theirs = getattr(found, field), getattr(sample, field)
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            return f"{field}: {mine}"
    if found.features is None or sample.features is None:
        return "no features"
    for field in ("hidden", "last_hidden"):
        mine, theirs = getattr(found.features, field), getattr(sample.features, field)
        if mine.shape != theirs.shape or not mine.is_floating_point():
            return f"{field}: {list(mine.shape)}, {mine.dtype}"
        if not theirs.numel():
            continue
        limit_T1 = _TOLERANCE * theirs.float().abs().amax(1, keepdim=True)
        # Not `>`: every comparison with NaN is false.
        if not bool(((mine.float() - theirs.float()).abs() <= limit_T1).all()):
            return f"{field}: other numbers"
    return None
