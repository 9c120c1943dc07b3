"""The run file's sections, as frozen keyword-only attrs classes: every key core knows, its type and its default.

Imports attrs only. Sections whose shape a plugin decides (`[draft]`, a weighting) are kept here as a type name and a
typed options object; load.py fills them in from the registry. Paths are as written; Run (pipeline/run.py) resolves them
against the run file's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from attrs.validators import and_, deep_iterable, ge, gt, in_, le, matches_re, optional

from deepspec_core.layers.options import LayerOptions
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule

KNOWN_STAGES = ("regenerate", "cache", "train", "evaluate", "export")
# Marks an attribute that is no key of the run file: loading puts a plugin's options object there.
FILLED_IN = {"key": False}
KERNELS = ("auto", "plain", "eager", "compiled", "triton")
DTYPES = ("float32", "bfloat16", "float16")
# The task that asks the prompts a run never trained on.
HELD_OUT = "held-out"
# What ships inside a plugin stands after it: builtin:NAME.
BUILTIN = "builtin:"


@frozen(kw_only=True)
class RunOptions:
    """[run]: what this run is called, where its results go, which stages it has, in order."""

    name: str = field(validator=matches_re(r"[\w.-]+"))
    output: str
    stages: tuple[str, ...] = field(validator=deep_iterable(in_(KNOWN_STAGES)))
    seed: int = field(default=42, validator=ge(0))
    threads: int | None = field(default=None, validator=optional(gt(0)))


@frozen(kw_only=True)
class TargetOptions:
    """[target]: the frozen model the draft is for. `layers` are the tapped decoder layers (zero-based outputs)."""

    model: str
    layers: tuple[int, ...]
    dtype: str | None = field(default=None, validator=optional(in_(DTYPES)))
    revision: str | None = None
    trust_remote_code: bool = False


@frozen(kw_only=True)
class SourceOptions:
    """One entry of [data] sources: a JSON-lines file, a Hub dataset, builtin:NAME. `limit` caps its conversations."""

    path: str
    weight: float = field(default=1.0, validator=gt(0))
    split: str | None = None
    limit: int | None = field(default=None, validator=optional(gt(0)))


@frozen(kw_only=True)
class DataOptions:
    """[data]: conversations, how long they may be, how many are held out from training.

    `system_prompt` stands before conversations without one of their own, in regeneration, training and evaluation
    alike. Supervised is each answer up to and including its end marker; of conversations that are rendered (not of
    those with tokens) `supervise_newline` adds the newline after the marker, `supervise_think_block` what the chat
    template itself puts before an answer, such as an empty think block.
    """

    sources: tuple[SourceOptions, ...]
    max_length: int = field(default=4096, validator=gt(1))
    held_out: float = field(default=0.05, validator=and_(ge(0.0), le(0.5)))
    min_supervised_tokens: int = field(default=14, validator=ge(1))
    system_prompt: str | None = None
    supervise_newline: bool = False
    supervise_think_block: bool = False


@frozen(kw_only=True)
class RegenerateOptions:
    """[regenerate]: the target answers the prompts itself. No servers: in process.

    Sampling keys left out take the family's recommended values.
    """

    servers: tuple[str, ...] = ()
    thinking: bool = False
    max_tokens: int = field(default=4096, validator=gt(0))
    temperature: float | None = field(default=None, validator=optional(ge(0.0)))
    top_p: float | None = field(default=None, validator=optional(and_(gt(0.0), le(1.0))))
    top_k: int | None = field(default=None, validator=optional(ge(0)))
    min_p: float | None = field(default=None, validator=optional(and_(ge(0.0), le(1.0))))
    batch_size: int = field(default=32, validator=gt(0))
    max_failures: float = field(default=0.05, validator=and_(ge(0.0), le(1.0)))
    api_key_env: str | None = None


@frozen(kw_only=True)
class FeaturesOptions:
    """[features]: "online" computes target features while training, "cached" reads them from the cache stage."""

    mode: str = "online"


@frozen(kw_only=True)
class CacheOptions:
    """[cache]: how features are stored. `path` defaults to a folder of the run."""

    format: str = "hdf5"
    dtype: str = field(default="bfloat16", validator=in_(("float32", "bfloat16", "float16", "float8_e4m3")))
    path: str | None = None
    shard_samples: int = field(default=512, validator=gt(0))
    batch_size: int = field(default=8, validator=gt(0))


@frozen(kw_only=True)
class DraftOptions:
    """[draft]: `type` names the algorithm; every other key but `layer` is the algorithm's own (`options`)."""

    type: str
    options: Any = field(metadata=FILLED_IN)
    layer: LayerOptions = field(factory=LayerOptions)


@frozen(kw_only=True)
class WeightingOptions:
    """[loss] weighting: `type` names it; every other key is its own (`options`, None where it has none)."""

    type: str = "uniform"
    options: Any = field(default=None, metadata=FILLED_IN)


def _numbers_first(terms: Mapping[str, float | CoefficientSchedule]) -> dict[str, float | CoefficientSchedule]:
    return dict(sorted(terms.items(), key=lambda entry: isinstance(entry[1], CoefficientSchedule)))


@frozen(kw_only=True)
class LossOptions:
    """[loss]: terms and their coefficients, and how the rows of a block weigh.

    A coefficient is a number, or a table that says how it changes over the optimizer's steps. Numbers stand before
    tables, as in a file that is written back: terms are summed in this order, and rounding depends on it.

    `kernels` says how logits are gone over: by autograd ("plain"), or by formula, compiled, in Triton on an
    accelerator, or one operation at a time ("eager"); "auto" takes the fastest that can run. `chunk_rows` is how many
    rows' logits exist at once; left out, it follows from the vocabulary.
    """

    terms: dict[str, float | CoefficientSchedule] = field(factory=lambda: {"ce": 1.0}, converter=_numbers_first)
    weighting: WeightingOptions = field(factory=WeightingOptions)
    chunk_rows: int | None = field(default=None, validator=optional(gt(0)))
    kernels: str = field(default="auto", validator=in_(KERNELS))


@frozen(kw_only=True)
class TrainOptions:
    """[train]: the optimizer, the batch and how long. `max_steps`, where given, ends training early."""

    lr: float = field(default=6e-4, validator=gt(0.0))
    global_batch_size: int = field(default=512, validator=gt(0))
    micro_batch_size: int = field(default=1, validator=gt(0))
    epochs: int = field(default=10, validator=gt(0))
    max_steps: int | None = field(default=None, validator=optional(gt(0)))
    warmup: float = field(default=0.04, validator=and_(ge(0.0), le(1.0)))
    weight_decay: float = field(default=0.0, validator=ge(0.0))
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = field(default=1.0, validator=gt(0.0))
    precision: str = field(default="bfloat16", validator=in_(("float32", "bfloat16")))
    checkpoint_every: int = field(default=3000, validator=gt(0))
    keep_checkpoints: int = field(default=2, validator=gt(0))
    log_every: int = field(default=10, validator=gt(0))
    loader_workers: int = field(default=0, validator=ge(0))


@frozen(kw_only=True)
class EvaluateOptions:
    """[evaluate]: real speculative decoding. `temperature` may be a list: each is evaluated.

    `tasks` are task names, "held-out" (prompts the run never trained on), or JSON-lines files with `turns` or
    `messages`. `limit` caps each task's prompts (held-out: 500 where left out). `batch_size` is the number of sequences
    decoded at once. `plain`: decode without the draft too, for the speed-up and the check of greedy outputs. A proposal
    ends before its first token whose confidence is below `confidence_threshold` (0: never), where a draft gives one.
    """

    tasks: tuple[str, ...] = (HELD_OUT,)
    temperature: tuple[float, ...] = field(default=(1.0,), validator=deep_iterable(ge(0.0)))
    max_new_tokens: int = field(default=2048, validator=gt(0))
    batch_size: int = field(default=1, validator=gt(0))
    limit: int | None = field(default=None, validator=optional(gt(0)))
    seed: int = field(default=980406, validator=ge(0))
    plain: bool = True
    confidence_threshold: float = field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    draft: str | None = None


@frozen(kw_only=True)
class ExportOptions:
    """[export]: formats to write."""

    to: tuple[str, ...] = ()


@frozen(kw_only=True)
class RunFile:
    """A whole run file."""

    run: RunOptions
    target: TargetOptions
    data: DataOptions
    draft: DraftOptions
    regenerate: RegenerateOptions = field(factory=RegenerateOptions)
    features: FeaturesOptions = field(factory=FeaturesOptions)
    cache: CacheOptions = field(factory=CacheOptions)
    loss: LossOptions = field(factory=LossOptions)
    train: TrainOptions = field(factory=TrainOptions)
    evaluate: EvaluateOptions = field(factory=EvaluateOptions)
    export: ExportOptions = field(factory=ExportOptions)
    required_plugins: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, tables: Mapping[str, Any], *, base: str = ".") -> RunFile:
        """A run file from nested mappings, as TOML would be read, checked as strictly.

        `base` is the folder that relative paths start at. ConfigError holds every problem.
        """
        from deepspec_core.config.load import run_file_of
        from deepspec_core.plugins.discovery import load_plugins

        return run_file_of(tables, folder=base, plugins=load_plugins())
