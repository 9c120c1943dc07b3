"""[train]: the optimizer, the batch and how long.

Imports attrs only. batching.py checks whether a draft type supports the batching.
"""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import deep_iterable, in_, instance_of, matches_re, optional

from deepspec_core.config.bounds import above, below, real, whole
from deepspec_core.config.key_marks import CHANGES_NOTHING
from deepspec_core.config.sampling_bounds import temperatures

PACKED = "packed"
# The value of `final` that makes the best checkpoint the finished draft.
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
    """[train.evaluation]: the evaluations during training, every `train.evaluate_every` steps.

    prompts: The number of held-out prompts to decode. Every evaluation decodes the same ones.
    max_new_tokens: The largest number of new tokens of one answer, at least 2: the target gives the first one before
        the draft proposes anything.
    temperature: The sampling temperature; 0 is greedy.
    warn_after: Warn when the accepted length has fallen in this many evaluations in a row.
    stop_after: End training when the accepted length has fallen in this many evaluations in a row. Left out: training
        does not end early.
    """

    prompts: int = field(default=32, validator=whole(1, _SEQUENCES))
    max_new_tokens: int = field(default=128, validator=whole(2, 2**27))
    temperature: float = field(default=0.0, validator=temperatures)
    warn_after: int = field(default=3, validator=whole(1), metadata=CHANGES_NOTHING)
    stop_after: int | None = field(default=None, validator=optional(whole(1)))


@frozen(kw_only=True)
class TrainOptions:
    """[train]: the optimizer, the batch, and the length of training.

    lr: The peak learning rate.
    optimizer: "adamw" or "muon". "muon" uses Muon for the matrices between hidden states, and AdamW for embeddings,
        heads, norms and biases. Muon's steps are scaled to the size of AdamW's, so `lr` and `weight_decay` serve both.
        They are computed in bfloat16, on a CPU without instructions for it in fp32. So results are not exact even with
        precision = "float32", and differ between such CPUs and others.
    global_batch_size: The number of sequences of one optimizer step, over all processes.
    micro_batch_size: The number of sequences (with "packed", of rows) that a process computes at once. Changes results
        by rounding only.
    batching: How sequences of different lengths form batches. "padded": each sequence has a row, padded to the longest
        of its micro-batch. "bucketed": also padded, but the sequences of a step have similar lengths. There is less
        padding, and steps consist of other sequences than with "padded". "packed": a row holds several sequences, and
        each is computed as if it were alone. A row is no longer than the longest training sample. Steps consist of the
        same sequences as with "padded", so results change by rounding only. Not every draft type takes packed rows. On
        a CPU, attention computes the full square of a packed row, so long rows are slow.
    epochs: The number of passes over the training samples.
    max_steps: The largest number of optimizer steps. The learning-rate schedule then ends at this step.
    warmup: The share of all steps over which the learning rate rises. After them it falls to 0 along a cosine.
    weight_decay: Decoupled weight decay: a step reduces each weight by this share of it, times the learning rate.
    betas: AdamW's two averaging factors, each below 1.
    clip_norm: A gradient with a larger norm is scaled down to this norm.
    checkpoint_activations: Compute the activations of the draft's layers again in the backward pass and do not keep
        them. A step takes about a third longer and much less memory, which long sequences need. Results are the same.
    precision: "bfloat16" is autocast over fp32 weights; "float32" is for exact results.
    checkpoint_every: The number of optimizer steps between checkpoints.
    keep_checkpoints: The number of newest checkpoints to keep.
    evaluate_every: The number of optimizer steps between evaluations of the draft. An evaluation decodes held-out
        prompts with draft and target and measures the accepted length. There is also one at the start and one at the
        end of training. Left out: no evaluations.
    evaluation: What these evaluations decode, and when a falling accepted length leads to a warning or ends training.
    keep_best: The number of checkpoints with the greatest accepted length to keep beside the newest ones, if there are
        evaluations.
    final: The checkpoint that becomes the finished draft: the "best" by accepted length, or the "last". Without
        evaluations it is the last.
    log_every: The number of optimizer steps between lines of metrics.jsonl.
    loader_workers: The number of processes that read and prepare samples. With 0 the training process does it itself.
    trackers: The trackers that show the lines of metrics.jsonl as curves: "tensorboard", "wandb", "mlflow", "trackio".
        Each must be installed. Left out: TensorBoard, if it is installed. []: none.
    tracker_project: The project of Weights & Biases and Trackio, or the experiment of MLflow.
    parallel: How several processes train one draft. "ddp": each process holds a copy of the weights and the optimizer
        state. "fsdp": each process holds a part of both (FSDP2); with several machines, the processes of each machine
        together hold all of it. "auto": "ddp", unless a copy does not fit a device. Changes results by rounding only.
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
