"""The options of `[draft] type = "eagle3"`, and how they are read back from a checkpoint's config.json.

Imports attrs, core's bounds and core's errors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import in_, instance_of, optional

from deepspec_core.config.bounds import above, whole
from deepspec_core.errors import CheckpointError

Normaliser = Literal["sequence", "padded_batch"]
Count = Literal["published", "labels"]


@frozen(kw_only=True)
class Eagle3Options:
    """The options of an Eagle3 draft.

    ttt_length: The number of steps of test-time training, and of tokens proposed per round.
    step_decay: The loss of step s has the weight step_decay ** s.
    num_layers: The number of decoder layers of the draft.
    normaliser: The divisor of the loss. "sequence": each sequence's sum is divided by its number of tokens, then the
        total by the number of sequences. "padded_batch": the total is divided by all positions of the padded batch, so
        the loss depends on the padding.
    count: Which predictions count in the loss. "published": those whose tapped position is supervised, as in the
        published code; the first proposal after a prompt then does not count, and one past the end of an answer does.
        "labels": those whose anchor, label and the tokens between them are part of one answer, as in decoding.
    num_anchors: The number of positions of a sample to train on, drawn anew in every epoch; their weights are raised so
        that they stand for all positions. The cost of the later steps and of the logits is proportional to this number.
        Left out: all positions.
    vocab_size: The number of tokens that the draft can propose: the most frequent ones in the run's answers. With fewer
        tokens, a step takes less time. Published drafts of other projects have 32,000. Left out: the target's
        vocabulary.
    qk_norm: Whether the draft has the family's query and key norms. Without them it has the layout that serving engines
        know.
    target_name: The target's name in the draft's config.json. Left out: where the target was loaded from.
    """

    ttt_length: int = field(default=7, validator=whole(1, 1024))
    step_decay: float = field(default=0.8, validator=above(0.0, 1.0))
    num_layers: int = field(default=1, validator=whole(1, 256))
    normaliser: Normaliser = field(default="sequence", validator=in_(("sequence", "padded_batch")))
    count: Count = field(default="published", validator=in_(("published", "labels")))
    num_anchors: int | None = field(default=None, validator=optional(whole(1, 2**20)))
    vocab_size: int | None = field(default=None, validator=optional(whole(1, 2**31)))
    qk_norm: bool = field(default=True, validator=instance_of(bool))
    target_name: str | None = field(default=None, validator=optional(instance_of(str)))


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an Eagle3 draft in the layout that this package writes."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(str(name).endswith("Eagle3Model") for name in names)


def options_of(config: Mapping[str, Any]) -> tuple[Eagle3Options, tuple[int, ...]]:
    """The options and taps a config.json describes; CheckpointError where a key is missing or makes no sense.

    config.json has the number of layers twice, and both must agree. The options that concern training only (normaliser,
    count, num_anchors) are not in it: their defaults come back.
    """
    try:
        options = Eagle3Options(
            ttt_length=config["ttt_length"],
            step_decay=config["step_loss_decay"],
            num_layers=config["draft_num_hidden_layers"],
            vocab_size=config.get("draft_vocab_size"),
            qk_norm=config.get("qk_norm", True),
            target_name=config.get("target_model_name_or_path"),
        )
        layers = config["num_hidden_layers"]
        if type(layers) is not int or layers != options.num_layers:
            raise ValueError(f"num_hidden_layers is {layers!r}, draft_num_hidden_layers {options.num_layers}")
        return options, tuple(config["target_layer_ids"])
    except KeyError as error:
        raise CheckpointError(
            "config.json lacks a key of an Eagle3 draft", where="config.json", expected=error
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json does not describe an Eagle3 draft", where="config.json", found=error.args[0]
        ) from None
