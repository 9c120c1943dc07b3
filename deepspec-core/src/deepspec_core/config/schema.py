"""The run file's sections, as frozen keyword-only attrs classes: every key core knows, its type and its default.

Imports attrs only. Sections whose shape a plugin decides (`[draft]`, a weighting) are kept here as a type name and a
typed options object; structure.py fills them in from the registry. load.py puts the sections together to a run file.
Paths are as written; Run (pipeline/run.py) resolves them against the run file's folder.
"""

from __future__ import annotations

from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import deep_iterable, in_, matches_re, optional

from deepspec_core.config.addresses import address, different
from deepspec_core.config.bounds import MANY, above, real, whole
from deepspec_core.config.draft_start import known_start
from deepspec_core.config.features_options import CACHED as CACHED
from deepspec_core.config.features_options import ONLINE as ONLINE
from deepspec_core.config.features_options import SERVER as SERVER
from deepspec_core.config.features_options import FeaturesOptions as FeaturesOptions
from deepspec_core.config.key_marks import CHANGES_NOTHING as CHANGES_NOTHING
from deepspec_core.config.key_marks import FILLED_IN as FILLED_IN
from deepspec_core.config.loss_options import KERNELS as KERNELS
from deepspec_core.config.loss_options import LossOptions as LossOptions
from deepspec_core.config.loss_options import TermOptions as TermOptions
from deepspec_core.config.loss_options import Terms as Terms
from deepspec_core.config.loss_options import WeightingOptions as WeightingOptions
from deepspec_core.config.sampling_bounds import once_each, stop_string, temperatures
from deepspec_core.config.train_options import BATCHING as BATCHING
from deepspec_core.config.train_options import BEST as BEST
from deepspec_core.config.train_options import PACKED as PACKED
from deepspec_core.config.train_options import TENSORBOARD as TENSORBOARD
from deepspec_core.config.train_options import HeldOutOptions as HeldOutOptions
from deepspec_core.config.train_options import TrainOptions as TrainOptions
from deepspec_core.layers.options import LayerOptions

KNOWN_STAGES = ("regenerate", "cache", "train", "evaluate", "export")
# Keys that a stage reads only by asking for them. Of no other key of their section it can be said who reads it, because
# a plugin's options are read as a whole.
READ_ALONE = ("draft.init", "draft.tree")
DTYPES = ("float32", "bfloat16", "float16")
# The task that asks the prompts a run never trained on.
HELD_OUT = "held-out"
# The option of a draft type that names the token which stands for what is to be proposed.
MASK = "mask_token_id"
# What ships inside a plugin stands after it: builtin:NAME.
BUILTIN = "builtin:"
# How the names of files end that hold conversations or prompts: JSON lines, JSON arrays, Parquet.
ROW_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
# A wider tree than this costs the target more than it can gain.
MOST_NODES = 1024
# More than any context, batch or generator of random numbers takes.
_TOKENS = 2**27
_SEQUENCES = 2**20
# Answers to one prompt.
MOST_ANSWERS = 1024
_SEEDS = 2**63 - 1


def changes_results(key: Attribute[Any]) -> bool:
    """Whether results made with another value of this key are other results."""
    return key.metadata != CHANGES_NOTHING


@frozen(kw_only=True)
class RunOptions:
    """[run]: what this run is called, where its results go, which stages it has.

    name: What the run is called in reports and in the names of its files.
    output: The folder for results, relative to the run file.
    stages: The stages, in this order: regenerate, cache, train, evaluate, export.
    seed: Seeds the draft's first weights, the held-out split, sampling in regeneration, and the order of training.
    threads: CPU threads of every stage. Left out: each stage's number follows from the size of its steps, and the
        run's first line says it.
    """

    name: str = field(validator=matches_re(r"[\w.-]+"), metadata=CHANGES_NOTHING)
    output: str = field(metadata=CHANGES_NOTHING)
    stages: tuple[str, ...] = field(validator=deep_iterable(in_(KNOWN_STAGES)), metadata=CHANGES_NOTHING)
    seed: int = field(default=42, validator=whole(0, _SEEDS))
    threads: int | None = field(default=None, validator=optional(whole(1, 1024)), metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class TargetOptions:
    """[target]: the frozen model that the draft is for.

    model: A Hub id, a directory, or builtin:NAME.
    layers: The tapped decoder layers, counted from 0, whose outputs the draft sees; -1 is the embedding. The last
        layer cannot be tapped. Left out: none, for draft types that need none and drafts that are not trained.
    dtype: The numbers the target computes with. Left out: float32 on a CPU, bfloat16 on an accelerator.
    revision: A branch, tag or commit of a Hub id.
    chat_template: A Jinja file to use in place of the target's own chat template, for instance for a base model.
    trust_remote_code: Run code that the target's repository brings. Off, such a target is refused.
    """

    model: str
    layers: tuple[int, ...] = ()
    dtype: str | None = field(default=None, validator=optional(in_(DTYPES)))
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = field(default=False, metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class SourceOptions:
    """An entry of [data] sources.

    path: A file of JSON lines (.jsonl), a JSON array (.json) or Parquet (.parquet), a dataset folder, a Hub dataset
        such as org/name, or builtin:NAME. JSON may be compressed (.jsonl.gz, .json.zst).
    weight: How often the next conversation is taken from this source, relative to the other sources' weights. A source
        is left when it is used up. Every conversation is used once.
    split: The split of a dataset. Left out: train. Files and builtins have none.
    limit: At most so many training conversations of this source.
    columns: The source's own names, for rows in none of the known forms: { prompt = "query", answer = "response" }.
        On the left stands one of messages, turns and prompt; beside it system, tools and id, with messages role and
        content, and with prompt input and answer.
    """

    path: str
    weight: float = field(default=1.0, validator=above(0.0, 1e9))
    split: str | None = None
    limit: int | None = field(default=None, validator=optional(whole(1)))
    # Not in repr: the digest of a cache is made from it, and caches without columns keep theirs.
    columns: dict[str, str] = field(factory=dict, repr=False)


@frozen(kw_only=True)
class DataOptions:
    """[data]: the conversations, how long they may be, how many are held out from training.

    An answer is supervised up to and including its end marker.

    sources: Where conversations come from; each entry is a table.
    max_length: Tokens of the longest sample; longer conversations are cut. At most the target's positions.
    held_out: The share of questions that are kept from training, for evaluation.
    max_bad_rows: The share of a source's rows that may be no usable conversation. They are dropped, counted, and kept
        in bad-rows.jsonl in the run's folder. One row may be bad in any case, unless this is 0.
    duplicates: What becomes of conversations whose systems and users say what an earlier one's said, from whichever
        source: "keep" them, as other answers to the same prompt, or "drop" all but the first.
    min_supervised_tokens: Samples with fewer supervised tokens are dropped, and counted.
    system_prompt: Put before conversations that have no system message. Regeneration, training and evaluation all do
        so.
    supervise: "all" answers of a conversation, or the "last" alone. "last" is for histories that the target did not say
        as they stand there, such as answers without their thinking.
    supervise_newline: Supervise the newline after an answer's end marker too. Not for runs that regenerate.
    supervise_think_block: Supervise what the chat template itself puts before an answer too, such as an empty think
        block. Not for runs that regenerate.
    workers: Processes that render and tokenise. They change no sample.
    """

    sources: tuple[SourceOptions, ...]
    max_length: int = field(default=4096, validator=whole(2, _TOKENS))
    held_out: float = field(default=0.05, validator=real(0.0, 0.5))
    max_bad_rows: float = field(default=0.05, validator=real(0.0, 1.0), metadata=CHANGES_NOTHING)
    duplicates: str = field(default="keep", validator=in_(("keep", "drop")))
    min_supervised_tokens: int = field(default=14, validator=whole(1, _TOKENS))
    system_prompt: str | None = None
    supervise: str = field(default="all", validator=in_(("all", "last")))
    supervise_newline: bool = False
    supervise_think_block: bool = False
    workers: int = field(default=1, validator=whole(1, 512), metadata=CHANGES_NOTHING)


def _batch_sizes(_options: object, attribute: Attribute[Any], value: int | tuple[int, ...]) -> None:
    sizes = value if isinstance(value, tuple) else (value,)
    deep_iterable(whole(1, _SEQUENCES))(None, attribute, sizes)
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"'{attribute.name}' must be one size, or several different ones: {value}")


def _truth_or_share(_options: object, attribute: Attribute[Any], value: bool | float) -> None:
    if not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"'{attribute.name}' must be true, false or a share between 0 and 1: {value}")


def _number_or_share(_options: object, attribute: Attribute[Any], value: int | float) -> None:
    if not (1 <= value <= MANY if isinstance(value, int) else 0 < value < 1):
        raise ValueError(f"'{attribute.name}' must be a share between 0 and 1, or a number of samples: {value}")


@frozen(kw_only=True)
class RegenerateOptions:
    """[regenerate]: the target answers the prompts itself.

    servers: OpenAI-compatible servers of the target that answer, such as "http://host:8000/v1". Left out: the target
        answers in this process.
    served_as: The name by which the servers know the target. Left out: target.model, or its folder.
    thinking: Ask in the target's thinking mode, in regeneration and in evaluation. A number between 0 and 1 is the
        share of conversations that are asked so. Their ids decide which. Evaluation then reports both modes.
        The chat template has to know the modes.
    answers: Answers to each conversation, with seeds of their own. Each is a training conversation.
    max_tokens: New tokens of one answer at most.
    temperature: 0 is greedy. Left out: what the target's makers recommend.
    top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this; 1 is off. Left out:
        as recommended.
    top_k: Sample from so many most probable tokens; 0 is off. Left out: as recommended.
    min_p: Sample only tokens whose probability is at least this share of the most probable token's; 0 is off. Left out:
        as recommended.
    unfinished: What becomes of an answer that meets max_tokens: "keep" it, without an end marker, or "drop" it.
    batch_size: Conversations answered at once in this process. It changes no answer.
    max_concurrency: Requests that one server has at once, at most. Fewer are sent where more bring no gain.
    timeout: Seconds that a server may take for one answer, and that a run waits where no server is left.
    max_failures: The stage stops if a larger share of the conversations fails.
    api_key_env: The environment variable that holds the servers' key.
    features: Take the features of a conversation together with its answer, so that the target reads it once. For runs
        whose cache stage takes its features from the same servers. The cache stage asks for what did not come.
    """

    servers: tuple[str, ...] = field(
        default=(), validator=[deep_iterable(address), different], metadata=CHANGES_NOTHING
    )
    served_as: str | None = field(default=None, metadata=CHANGES_NOTHING)
    thinking: bool | float = field(default=False, validator=_truth_or_share)
    answers: int = field(default=1, validator=whole(1, MOST_ANSWERS))
    max_tokens: int = field(default=4096, validator=whole(1, _TOKENS))
    temperature: float | None = field(default=None, validator=optional(temperatures))
    top_p: float | None = field(default=None, validator=optional(above(0.0, 1.0)))
    top_k: int | None = field(default=None, validator=optional(whole(0)))
    min_p: float | None = field(default=None, validator=optional(real(0.0, 1.0)))
    unfinished: str = field(default="keep", validator=in_(("keep", "drop")))
    batch_size: int = field(default=32, validator=whole(1, _SEQUENCES), metadata=CHANGES_NOTHING)
    max_concurrency: int = field(default=512, validator=whole(1, _SEQUENCES), metadata=CHANGES_NOTHING)
    timeout: float = field(default=1800.0, validator=above(0.0, 1e6), metadata=CHANGES_NOTHING)
    max_failures: float = field(default=0.05, validator=real(0.0, 1.0), metadata=CHANGES_NOTHING)
    api_key_env: str | None = field(default=None, metadata=CHANGES_NOTHING)
    features: bool = field(default=False, metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class CacheOptions:
    """[cache]: how the cache stage stores features.

    format: How features are stored; see `deepspec plugins`.
    dtype: The number format of stored features. "float8_e4m3" takes about half the room of bfloat16. On the quickstart
        it trained as good a draft (three seeds). Take it where disk or network is short, and bfloat16 otherwise.
    path: The cache's folder. Left out: cache/ in the run's output. Another run's cache may be named.
    subset: Cache and train on a part of the samples, for pilots: a share such as 0.1, or a number of samples. Their ids
        decide which, and a smaller part is contained in every larger one. Of another run's cache this part is read.
    shard_samples: Samples in one file of the cache.
    batch_size: Samples the target reads at once.
    """

    format: str = "hdf5"
    dtype: str = field(default="bfloat16", validator=in_(("float32", "bfloat16", "float16", "float8_e4m3")))
    path: str | None = field(default=None, metadata=CHANGES_NOTHING)
    subset: int | float | None = field(default=None, validator=optional(_number_or_share))
    shard_samples: int = field(default=512, validator=whole(1), metadata=CHANGES_NOTHING)
    batch_size: int = field(default=8, validator=whole(1, _SEQUENCES), metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class TreeOptions:
    """[draft] tree: the draft proposes trees, chosen by its own probabilities. For decoding: training knows no trees.

    nodes: Tokens of a tree at most. The target scores them all in one pass and commits those of one path, which has no
        more tokens than a chain has.
    """

    nodes: int = field(validator=whole(1, MOST_NODES))


@frozen(kw_only=True)
class DraftOptions:
    """[draft]: the algorithm. Its own keys stand in the same section.

    type: The algorithm; its own keys stand beside this one. See `deepspec plugins`.
    layer: The draft's own shape, where it is not the target's.
    init: A draft checkpoint whose weights training begins with: a directory, the output of another run, or a Hub id.
        It must be of this type, and as this section and `target.layers` say. Or the target's own layers, where the
        draft's have their shapes: "target:last" copies its last ones, "target:taps" the tapped ones. Left out: new
        weights.
    tree: {nodes = 16} evaluates with trees of 16 tokens. Only evaluation reads it, so it may change under a trained
        draft. For draft types that propose trees. Left out: chains.
    """

    type: str
    options: Any = field(metadata=FILLED_IN)
    layer: LayerOptions = field(factory=LayerOptions)
    init: str | None = field(default=None, validator=known_start)
    tree: TreeOptions | None = None


@frozen(kw_only=True)
class SchedulerOptions:
    """[evaluate.scheduler]: the target verifies the draft tokens that are worth it at the present load.

    cost_table: A file that `deepspec profile` wrote for this target on such a machine.
    asynchronous: The number of verified tokens comes from the confidences of two rounds earlier.
    """

    cost_table: str
    asynchronous: bool = False


@frozen(kw_only=True)
class EvaluateOptions:
    """[evaluate]: real speculative decoding.

    tasks: "held-out" (prompts the run never trained on), registered tasks, or files of rows as data.sources takes them.
        NAME:FILE is a registered task, asked from a file.
    turns: "first" asks the first user turn of a prompt, as published; "all" every one, the model's answers between.
    temperature: Each of these temperatures is evaluated; 0 is greedy.
    top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this; 1 is off.
    top_k: Sample from so many most probable tokens; 0 is off.
    min_p: Sample only tokens whose probability is at least this share of the most probable token's; 0 is off.
    repetition_penalty: Divides the positive logits, and multiplies the others, of tokens that the prompt or the answer
        has already, also at temperature 0; 1 is off. The order is: this, temperature, top_k, top_p, min_p.
    stop: An answer ends with the token that completes one of these strings in its text.
    samples: Answers to each prompt, with seeds of their own. At temperature 0 there is one.
    max_new_tokens: New tokens of one answer at most.
    batch_size: Sequences decoded at once. A list evaluates at each of them, for the speed-up under load.
    limit: Prompts of each task at most. Left out: as many as the task says of itself, or all; and 500 of held-out
        prompts.
    max_failures: The stage stops if a larger share of a task's samples fails: the template refuses the prompt, or the
        target or the draft raises an error on it. They are listed, and in no figure.
    seed: Seeds sampling, and the choice of prompts where a task has more than are asked.
    plain: Decode without the draft too: for the speed-up and the comparison of greedy outputs.
    confidence_threshold: A proposal ends before its first token of lower confidence, if the draft gives any; 0: not.
    draft: A draft checkpoint to evaluate (directory or Hub id) in place of the run's own.
    calibration: A file that `deepspec calibrate` wrote for this draft. The draft's confidences are scaled by it.
    scheduler: {cost_table = "FILE"} verifies what pays by that table, if the draft gives confidences.
    """

    tasks: tuple[str, ...] = (HELD_OUT,)
    turns: str = field(default="first", validator=in_(("first", "all")))
    temperature: tuple[float, ...] = field(default=(1.0,), validator=deep_iterable(temperatures, once_each))
    top_p: float = field(default=1.0, validator=above(0.0, 1.0))
    top_k: int = field(default=0, validator=whole(0))
    min_p: float = field(default=0.0, validator=real(0.0, 1.0))
    repetition_penalty: float = field(default=1.0, validator=real(0.01, 100.0))
    stop: tuple[str, ...] = field(default=(), validator=deep_iterable(stop_string))
    samples: int = field(default=1, validator=whole(1, 2**16))
    max_new_tokens: int = field(default=2048, validator=whole(1, _TOKENS))
    batch_size: int | tuple[int, ...] = field(default=1, validator=_batch_sizes)
    limit: int | None = field(default=None, validator=optional(whole(1)))
    max_failures: float = field(default=0.05, validator=real(0.0, 1.0), metadata=CHANGES_NOTHING)
    seed: int = field(default=980406, validator=whole(0, _SEEDS))
    plain: bool = True
    confidence_threshold: float = field(default=0.0, validator=real(0.0, 1.0))
    draft: str | None = None
    calibration: str | None = None
    scheduler: SchedulerOptions | None = None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """All of them."""
        return (self.batch_size,) if isinstance(self.batch_size, int) else self.batch_size


@frozen(kw_only=True)
class ExportOptions:
    """[export]: what to write for serving engines.

    to: Formats to write; see `deepspec plugins`.
    """

    to: tuple[str, ...] = ()
