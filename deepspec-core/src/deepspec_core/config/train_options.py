"""[train]: the optimizer, the batch and how long.

Imports attrs only. Which batching a draft type takes, batching.py checks.
"""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import deep_iterable, in_, optional

from deepspec_core.config.bounds import above, below, real, whole
from deepspec_core.config.key_marks import CHANGES_NOTHING

PACKED = "packed"
_SEQUENCES = 2**20  # more than any batch takes
BATCHING = ("padded", "bucketed", PACKED)


@frozen(kw_only=True)
class TrainOptions:
    """[train]: the optimizer, the batch and how long.

    lr: The peak learning rate of AdamW.
    global_batch_size: Sequences of one optimizer step, over all processes.
    micro_batch_size: Sequences a process computes at once, or rows if they are packed. Changes results by rounding
        only.
    batching: What is done about different lengths. "padded": each sequence has a row, filled up to the longest beside
        it. "bucketed": the same, with steps of sequences of like length, so less is padding, and steps are others.
        "packed": a row holds several sequences, none longer than the longest alone, and each is computed as if alone.
        Steps are those of "padded", so results change by rounding only. Not every draft type takes packed rows.
    epochs: Passes over the training samples.
    max_steps: Training ends after so many optimizer steps at most. The learning-rate schedule ends with it.
    warmup: The share of all steps over which the learning rate rises; after it, it falls to 0 along a cosine.
    weight_decay: AdamW's weight decay.
    betas: AdamW's two averaging factors, each below 1.
    clip_norm: A gradient with a larger norm is scaled down to this norm.
    precision: "bfloat16" is autocast over fp32 weights; "float32" is for exact results.
    checkpoint_every: Optimizer steps between checkpoints.
    keep_checkpoints: How many of the newest checkpoints stay.
    log_every: Optimizer steps between lines of metrics.jsonl.
    loader_workers: Processes that read and prepare samples; 0: the training process itself.
    """

    lr: float = field(default=6e-4, validator=above(0.0, 1e3))
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
    checkpoint_every: int = field(default=3000, validator=whole(1), metadata=CHANGES_NOTHING)
    keep_checkpoints: int = field(default=2, validator=whole(1), metadata=CHANGES_NOTHING)
    log_every: int = field(default=10, validator=whole(1), metadata=CHANGES_NOTHING)
    loader_workers: int = field(default=0, validator=whole(0, 512), metadata=CHANGES_NOTHING)
