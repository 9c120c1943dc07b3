"""[train]: the optimizer, the batch and how long.

Imports attrs only. Which batching a draft type takes, batching.py checks.
"""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import deep_iterable, in_, instance_of, matches_re, optional

from deepspec_core.config.bounds import above, below, real, whole
from deepspec_core.config.key_marks import CHANGES_NOTHING
from deepspec_core.config.sampling_bounds import temperatures

PACKED = "packed"
# Which checkpoint the finished draft is.
BEST = "best"
AUTO, DDP, FSDP = "auto", "ddp", "fsdp"
PARALLEL = (AUTO, DDP, FSDP)
ADAMW, MUON = "adamw", "muon"
_SEQUENCES = 2**20  # more than any batch takes
BATCHING = ("padded", "bucketed", PACKED)
TENSORBOARD = "tensorboard"
TRACKERS = (TENSORBOARD, "wandb", "mlflow", "trackio")


@frozen(kw_only=True)
class HeldOutOptions:
    """[train.evaluation]: what the draft decodes while it is trained, every `train.evaluate_every` steps.

    prompts: Held-out prompts that are decoded, always the same.
    max_new_tokens: New tokens of one answer at most, 2 or more: the first one is not the draft's.
    temperature: 0 is greedy.
    warn_after: A warning is given when the accepted length has fallen so many times in a row.
    stop_after: Training ends when the accepted length has fallen so many times in a row. Left out: it does not end
        early.
    """

    prompts: int = field(default=32, validator=whole(1, _SEQUENCES))
    max_new_tokens: int = field(default=128, validator=whole(2, 2**27))
    temperature: float = field(default=0.0, validator=temperatures)
    warn_after: int = field(default=3, validator=whole(1), metadata=CHANGES_NOTHING)
    stop_after: int | None = field(default=None, validator=optional(whole(1)))


@frozen(kw_only=True)
class TrainOptions:
    """[train]: the optimizer, the batch and how long.

    lr: The peak learning rate.
    optimizer: "adamw", or "muon": Muon for the matrices between hidden states, AdamW for embeddings, heads, norms and
        biases. Muon's steps are scaled to the size of AdamW's, so `lr` and `weight_decay` serve both. They are computed
        in bfloat16, so results are not exact even in float32.
    global_batch_size: Sequences of one optimizer step, over all processes.
    micro_batch_size: Sequences a process computes at once, or rows if they are packed. Changes results by rounding
        only.
    batching: What is done about different lengths. "padded": each sequence has a row, filled up to the longest beside
        it. "bucketed": the same, with steps of sequences of like length, so less is padding, and steps are others.
        "packed": a row holds several sequences, none longer than the longest alone, and each is computed as if alone.
        Steps are those of "padded", so results change by rounding only. Not every draft type takes packed rows. On a
        CPU attention computes the whole square of a packed row, so long ones are slow there.
    epochs: Passes over the training samples.
    max_steps: Training ends after so many optimizer steps at most. The learning-rate schedule ends with it.
    warmup: The share of all steps over which the learning rate rises; after it, it falls to 0 along a cosine.
    weight_decay: The share of each weight that a step takes from it, times the learning rate.
    betas: AdamW's two averaging factors, each below 1.
    clip_norm: A gradient with a larger norm is scaled down to this norm.
    checkpoint_activations: Whether the draft's layers compute their activations again in backward and do not keep them.
        A step takes about a third longer and much less memory, which long sequences need. Results are the same.
    precision: "bfloat16" is autocast over fp32 weights; "float32" is for exact results.
    checkpoint_every: Optimizer steps between checkpoints.
    keep_checkpoints: How many of the newest checkpoints stay.
    evaluate_every: Optimizer steps between evaluations of the draft: it decodes held-out prompts with the target, and
        the tokens that a round commits are counted. They are also at the start and at the end. Left out: there are
        none.
    evaluation: What is decoded then, and when a falling accepted length is told of or ends training.
    keep_best: How many checkpoints of the greatest accepted length stay beside the newest, if there are evaluations.
    final: The checkpoint that becomes the finished draft: the "best" by accepted length, or the "last". Without
        evaluations it is the last.
    log_every: Optimizer steps between lines of metrics.jsonl.
    loader_workers: Processes that read and prepare samples; 0: the training process itself.
    trackers: Where the lines of metrics.jsonl are shown as curves: "tensorboard", "wandb", "mlflow", "trackio". Each
        has to be installed. Left out: TensorBoard, if it is installed. []: nowhere.
    tracker_project: The project of Weights & Biases and Trackio, or the experiment of MLflow.
    parallel: How several processes train one draft. "ddp": each has a copy of weights and optimizer state. "fsdp": each
        has a part of both (FSDP2), and on several machines each machine has all parts. "auto": "ddp", unless a copy
        does not fit a device. Changes results by rounding only.
    """

    lr: float = field(default=6e-4, validator=above(0.0, 1e3))
    optimizer: str = field(default=ADAMW, validator=in_((ADAMW, MUON)))
    global_batch_size: int = field(default=512, validator=whole(1, _SEQUENCES))
    micro_batch_size: int = field(default=1, validator=whole(1, _SEQUENCES), metadata=CHANGES_NOTHING)
    batching: str = field(default="padded", validator=in_(BATCHING))
    epochs: int = field(default=10, validator=whole(1))
    max_steps: int | None = field(default=None, validator=optional(whole(1)))
    warmup: float = field(default=0.04, validator=real(0.0, 1.0))
    weight_decay: float = field(default=0.0, validator=real(0.0, 1e3))
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable(below(0.0, 1.0)))
    clip_norm: float = field(default=1.0, validator=above(0.0, 1e9))
    precision: str = field(default="bfloat16", validator=in_(("float32", "bfloat16")))
    checkpoint_activations: bool = field(default=False, metadata=CHANGES_NOTHING)
    checkpoint_every: int = field(default=3000, validator=whole(1), metadata=CHANGES_NOTHING)
    keep_checkpoints: int = field(default=2, validator=whole(1), metadata=CHANGES_NOTHING)
    evaluate_every: int | None = field(default=None, validator=optional(whole(1)))
    evaluation: HeldOutOptions = field(factory=HeldOutOptions)
    keep_best: int = field(default=1, validator=whole(1), metadata=CHANGES_NOTHING)
    final: str = field(default=BEST, validator=in_((BEST, "last")))
    log_every: int = field(default=10, validator=whole(1), metadata=CHANGES_NOTHING)
    loader_workers: int = field(default=0, validator=whole(0, 512), metadata=CHANGES_NOTHING)
    trackers: tuple[str, ...] | None = field(
        default=None, validator=optional(deep_iterable(in_(TRACKERS), instance_of(tuple))), metadata=CHANGES_NOTHING
    )
    tracker_project: str = field(default="deepspec", validator=matches_re(r"\S(.*\S)?"), metadata=CHANGES_NOTHING)
    parallel: str = field(default=AUTO, validator=in_(PARALLEL), metadata=CHANGES_NOTHING)
