"""What `[draft] type = "eagle3"` may say, and how the same is read back from a checkpoint's config.json.

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

    ttt_length: Steps of test-time training, and tokens proposed a round.
    step_decay: The loss of step s weighs step_decay ** s.
    num_layers: Layers of the draft.
    normaliser: What the loss is divided by. "sequence": each sequence's sum by its number of tokens, then the total by
        the number of sequences. "padded_batch": the total by all positions of the padded batch, so it depends on
        padding.
    count: Which predictions count. "published": those whose tapped position is supervised, as in the published code. It
        leaves out the first proposal after a prompt, and counts one past an answer's end. "labels": those whose anchor,
        label and the tokens between are of one answer, as in decoding.
    num_anchors: So many positions of a sample, drawn anew in every epoch, are trained at, and weigh accordingly more.
        Left out: all. The cost of the later steps and of the logits is proportional to it.
    vocab_size: The number of tokens that can be proposed: those that the run's answers have most of. Fewer take less
        time a step. Published drafts of other projects have 32,000. Left out: the target's.
    qk_norm: Keep the family's query and key norms. Off gives the layout that serving engines know.
    target_name: What config.json names as the target. Left out: where the target was loaded from.
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
    """Whether a config.json is of an Eagle3 draft, as this package publishes them."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(str(name).endswith("Eagle3Model") for name in names)


def options_of(config: Mapping[str, Any]) -> tuple[Eagle3Options, tuple[int, ...]]:
    """The options and taps a config.json describes; CheckpointError where a key is missing or makes no sense.

    The number of layers stands there twice. What concerns training alone (normaliser, count, num_anchors) is no part
    of a checkpoint: the defaults come back.
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
