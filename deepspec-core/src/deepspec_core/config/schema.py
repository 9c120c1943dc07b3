"""The run file's sections, as frozen keyword-only attrs classes: every key core knows, its type and its default.

Imports attrs only. A plugin decides the keys of some sections (`[draft]`, a weighting). Here such a section holds a
type name and an options object, which structure.py builds with the registry's help. load.py combines the sections into
a run file. Paths are stored as written; Run (pipeline/run.py) resolves them against the run file's folder.
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
# Keys that core reads one by one. The other keys of their section are a plugin's options, which are read as a whole, so
# core cannot tell which stage reads which of them.
READ_ALONE = ("draft.init", "draft.tree")
DTYPES = ("float32", "bfloat16", "float16")
# The task that asks the prompts a run never trained on.
HELD_OUT = "held-out"
# The option of a draft type that names the mask token: it fills the slots whose tokens the draft is to propose.
MASK = "mask_token_id"
# The prefix of models and prompts that ship inside a plugin: builtin:NAME.
BUILTIN = "builtin:"
# Endings of the names of files with conversations or prompts: JSON lines, JSON arrays, Parquet.
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
    """Whether another value of this key would change results."""
    return key.metadata != CHANGES_NOTHING


@frozen(kw_only=True)
class RunOptions:
    """[run]: the run's name, the folder for its results, and its stages.

    name: The run's name in reports and in the names of its files.
    output: The folder for results, relative to the run file.
    stages: The stages to run, in this order: regenerate, cache, train, evaluate, export.
    seed: The seed of the draft's initial weights, the held-out split, sampling in regeneration, and the order of
        training samples.
    threads: The number of CPU threads of every stage. Left out: each stage chooses a number by the size of its steps,
        and the run's first line reports it.
    """

    name: str = field(validator=matches_re(r"[\w.-]+"), metadata=CHANGES_NOTHING)
    output: str = field(metadata=CHANGES_NOTHING)
    stages: tuple[str, ...] = field(validator=deep_iterable(in_(KNOWN_STAGES)), metadata=CHANGES_NOTHING)
    seed: int = field(default=42, validator=whole(0, _SEEDS))
    threads: int | None = field(default=None, validator=optional(whole(1, 1024)), metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class TargetOptions:
    """[target]: the frozen model that the draft is trained for.

    model: A Hub id, a directory, or builtin:NAME.
    layers: The tapped decoder layers, counted from 0. The draft reads their outputs. -1 is the embedding; the last
        layer cannot be tapped. Left out: no taps, for draft types that need none and drafts that are not trained.
    dtype: The number format in which the target computes. Left out: float32 on a CPU, bfloat16 on an accelerator.
    revision: A branch, tag or commit of the Hub repository.
    chat_template: A Jinja file to use in place of the target's own chat template, for instance for a base model.
    trust_remote_code: Whether to run code from the target's repository. If false, a target that needs such code is
        refused.
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
    weight: How often the next conversation comes from this source, relative to the other sources' weights. When a
        source is used up, the others go on. Every conversation is used once.
    split: The split of a dataset. Left out: train. Files and builtins have no splits.
    limit: The largest number of training conversations to take from this source.
    columns: The source's column names, for rows in none of the known forms: { prompt = "query", answer = "response" }.
        The keys are DeepSpec's names and the values the source's. Exactly one of messages, turns and prompt is
        required. system, tools and id may be added; role and content too with messages; input and answer too with
        prompt.
    """

    path: str
    weight: float = field(default=1.0, validator=above(0.0, 1e9))
    split: str | None = None
    limit: int | None = field(default=None, validator=optional(whole(1)))
    # Not in repr: the digest of a cache is made from it, and caches without columns keep theirs.
    columns: dict[str, str] = field(factory=dict, repr=False)


@frozen(kw_only=True)
class DataOptions:
    """[data]: the conversations, their maximum length, and the share held out from training.

    An answer is supervised up to and including its end marker.

    sources: Where conversations come from; each entry is a table.
    max_length: The largest number of tokens of a sample; longer conversations are cut. At most the target's number of
        positions.
    held_out: The share of questions that training leaves out, so that evaluation can ask them.
    max_bad_rows: The largest share of a source's rows that may be unusable as conversations. Such rows are dropped,
        counted, and written to bad-rows.jsonl in the run's folder. One bad row is always allowed, unless this is 0.
    duplicates: What happens to a conversation whose system and user messages equal an earlier one's, from any source:
        "keep" it, as another answer to the same prompt, or "drop" it.
    min_supervised_tokens: Samples with fewer supervised tokens are dropped and counted.
    system_prompt: The system message of conversations that have none. Regeneration, training and evaluation all add
        it.
    supervise: Which answers of a conversation training supervises: "all", or only the "last". "last" is for
        conversations whose earlier answers are not what the target generated, such as answers without their thinking.
    supervise_newline: Also supervise the newline after an answer's end marker. Not for runs that regenerate.
    supervise_think_block: Also supervise what the chat template puts before an answer, such as an empty think block.
        Not for runs that regenerate.
    workers: The number of processes that render and tokenise conversations. It changes no sample.
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
        raise ValueError(f"'{attribute.name}' must be one batch size, or a list of different ones: {value}")


def _truth_or_share(_options: object, attribute: Attribute[Any], value: bool | float) -> None:
    if not isinstance(value, bool) and not 0 < value < 1:
        raise ValueError(f"'{attribute.name}' must be true, false or a share between 0 and 1: {value}")


def _number_or_share(_options: object, attribute: Attribute[Any], value: int | float) -> None:
    if not (1 <= value <= MANY if isinstance(value, int) else 0 < value < 1):
        raise ValueError(f"'{attribute.name}' must be a share between 0 and 1, or a number of samples: {value}")


@frozen(kw_only=True)
class RegenerateOptions:
    """[regenerate]: the target generates the answers that the draft is trained on.

    servers: OpenAI-compatible servers that generate the target's answers, such as "http://host:8000/v1". Left out: the
        target generates them in this process.
    served_as: The target's model name on the servers. Left out: target.model, or its folder.
    thinking: Use the target's thinking mode, in regeneration and in evaluation. A number between 0 and 1 is the share
        of conversations in thinking mode, selected by their ids; evaluation then reports both modes. The chat template
        must support the modes.
    answers: The number of answers to each conversation, each with its own seed. Each becomes a training conversation.
    max_tokens: The largest number of new tokens of one answer.
    temperature: The sampling temperature; 0 is greedy. Left out: the recommendation of the target's makers.
    top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this; 1 is off. Left out:
        as recommended.
    top_k: Sample from this many most probable tokens; 0 is off. Left out: as recommended.
    min_p: Sample only tokens whose probability is at least this share of the most probable token's; 0 is off. Left out:
        as recommended.
    unfinished: What happens to an answer that reaches max_tokens: "keep" it, without an end marker, or "drop" it.
    batch_size: The number of conversations answered at once in this process. It changes no answer.
    max_concurrency: The largest number of requests that one server has at once. The run sends fewer where more would
        not raise the throughput.
    timeout: Seconds that a server may take for one answer, and that the run waits while no server is usable.
    max_failures: The stage stops if a larger share of the conversations fails.
    api_key_env: The environment variable that holds the servers' API key.
    features: Receive a conversation's features together with its answer, so that the target reads the conversation
        once. For runs whose cache stage takes its features from the same servers. The cache stage requests the features
        that did not arrive with an answer.
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

    format: The storage format; see `deepspec plugins`.
    dtype: The number format of stored features. "float8_e4m3" takes about half the space of bfloat16. On the quickstart
        it trained as good a draft (three seeds). Use it where disk or network is short, and bfloat16 otherwise.
    path: The cache's folder. Left out: cache/ in the run's output. It may be another run's cache.
    subset: Cache and train on a part of the samples, for pilot runs: a share such as 0.1, or a number of samples. They
        are selected by their ids, so a smaller part is contained in every larger one. If the cache is another run's,
        only this part of it is read.
    shard_samples: The number of samples in one file of the cache.
    batch_size: The number of samples that the target reads at once.
    """

    format: str = "hdf5"
    dtype: str = field(default="bfloat16", validator=in_(("float32", "bfloat16", "float16", "float8_e4m3")))
    path: str | None = field(default=None, metadata=CHANGES_NOTHING)
    subset: int | float | None = field(default=None, validator=optional(_number_or_share))
    shard_samples: int = field(default=512, validator=whole(1), metadata=CHANGES_NOTHING)
    batch_size: int = field(default=8, validator=whole(1, _SEQUENCES), metadata=CHANGES_NOTHING)


@frozen(kw_only=True)
class TreeOptions:
    """[draft] tree: the draft proposes trees of tokens, which it selects by its own probabilities. Only decoding uses
    trees; training does not.

    nodes: The largest number of tokens in a tree. The target scores all of them in one pass and commits the tokens of
        one path. A path is no longer than a chain would be.
    """

    nodes: int = field(validator=whole(1, MOST_NODES))


@frozen(kw_only=True)
class DraftOptions:
    """[draft]: the draft's algorithm and its options. The algorithm's own keys go in this section too.

    type: The algorithm; its own keys go beside this one. See `deepspec plugins`.
    layer: The shape of the draft's layers, where it differs from the target's.
    init: What training starts from. A draft checkpoint: a directory, the output of another run, or a Hub id; its type,
        options and taps must be those of this section and of `target.layers`. Or the target's own layers, if the
        draft's layers have the same shapes: "target:last" copies the last ones, "target:taps" the tapped ones. Left
        out: new random weights.
    tree: {nodes = 16} evaluates with trees of at most 16 tokens. Only evaluation reads this key, so it may be changed
        after training. For draft types that propose trees. Left out: chains.
    """

    type: str
    options: Any = field(metadata=FILLED_IN)
    layer: LayerOptions = field(factory=LayerOptions)
    init: str | None = field(default=None, validator=known_start)
    tree: TreeOptions | None = None


@frozen(kw_only=True)
class SchedulerOptions:
    """[evaluate.scheduler]: in each round, the target verifies only as many draft tokens as pay off at the present
    load.

    cost_table: A file that `deepspec profile` wrote for this target on a machine of this kind.
    asynchronous: Choose the number of tokens to verify from the confidences of two rounds earlier.
    """

    cost_table: str
    asynchronous: bool = False


@frozen(kw_only=True)
class EvaluateOptions:
    """[evaluate]: speculative decoding with the draft and the target, measured.

    tasks: What to evaluate on: "held-out" (prompts that the run did not train on), registered tasks, or files of rows
        in the forms that data.sources takes. NAME:FILE is a registered task with its prompts read from a file.
    turns: "first" asks the first user turn of a prompt, as published. "all" asks every user turn, with the model's own
        answers in between.
    temperature: A list of temperatures; each is evaluated. 0 is greedy.
    top_p: Sample from the smallest set of most probable tokens whose probabilities add up to this; 1 is off.
    top_k: Sample from this many most probable tokens; 0 is off.
    min_p: Sample only tokens whose probability is at least this share of the most probable token's; 0 is off.
    repetition_penalty: For tokens that already occur in the prompt or the answer, positive logits are divided by this
        number and negative ones multiplied, also at temperature 0. 1 is off. The order of operations is:
        repetition_penalty, temperature, top_k, top_p, min_p.
    stop: An answer ends with the token that completes one of these strings in its text.
    samples: The number of answers to each prompt, each with its own seed. At temperature 0 there is one.
    max_new_tokens: The largest number of new tokens of one answer.
    batch_size: The number of sequences decoded at once. With a list, each size is evaluated: this shows the speed-up
        under load.
    limit: The largest number of prompts of each task. Left out: the number that the task itself sets, or all; for
        held-out prompts, 500.
    max_failures: The stage stops if a larger share of a task's samples fails. A sample fails if the chat template
        refuses its prompt, or if the target or the draft raises an error on it. Failed samples are listed and are part
        of no figure.
    seed: The seed of sampling, and of the selection of prompts where a task has more than are asked.
    plain: Also decode without the draft, for the speed-up and the comparison of greedy outputs.
    confidence_threshold: End a proposal before its first token whose confidence is below this, if the draft gives
        confidences; 0 is off.
    draft: A draft checkpoint to evaluate (a directory or Hub id) in place of the run's own.
    calibration: A file that `deepspec calibrate` wrote for this draft. It scales the draft's confidences.
    scheduler: {cost_table = "FILE"}: in each round, verify the number of draft tokens that pays off by this cost table.
        For drafts that give confidences.
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
        """All batch sizes, also where the key holds one number."""
        return (self.batch_size,) if isinstance(self.batch_size, int) else self.batch_size


@frozen(kw_only=True)
class ExportOptions:
    """[export]: the formats in which the draft is written for serving engines.

    to: The formats to write; see `deepspec plugins`.
    """

    to: tuple[str, ...] = ()
