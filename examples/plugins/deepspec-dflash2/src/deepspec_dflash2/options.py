"""The keys of `[draft]` for `type = "dflash2"`, and how config.json is read back. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

from attrs import field, fields, frozen
from attrs.validators import in_, not_

from deepspec_core.config.bounds import whole
from deepspec_dflash.options import DFlashOptions, backbone_keys, has_class, reading, taps_of

CLASS = "DFlash2DraftModel"
# The keys of `dflash_config` that are this package's own options by the same name.
KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
ONE = "'selector_top_k' must be 0 (off) or at least 2: one candidate is no choice"


@frozen(kw_only=True)
class DFlash2Options(DFlashOptions):
    """The options of a DFlash 2 draft: those of DFlash, and of its two parts.

    Published drafts have sliding layers: `[draft.layer] window = 2048`. Without it a draft attends to the whole text,
    and its config.json says so.

    block_size: Slots of a block, the anchor's included.
    anchor_predicts: On: every slot, the anchor's too, predicts the token after its own position. Off, as published: the
        anchor's slot predicts nothing, and every other slot predicts the token at its own position.
    conv_kernel_size: Slots of a block that a convolution reads, the own one included; 0: no convolutions.
    conv_group_size: Channels that share the part of a kernel that depends on the input. It divides the hidden size.
    selector_rank: Rank of the selector's score of two tokens that follow each other.
    selector_top_k: The head's most probable tokens of each slot that the selector chooses from; 0: no selector, and
        then the loss has no term "selector".
    """

    block_size: int = field(default=8, validator=fields(DFlashOptions).block_size.validator)
    anchor_predicts: bool = field(default=False, validator=fields(DFlashOptions).anchor_predicts.validator)
    conv_kernel_size: int = field(default=2, validator=whole(0, 64))
    conv_group_size: int = field(default=16, validator=whole(1, 2**16))
    selector_rank: int = field(default=256, validator=whole(1, 2**16))
    selector_top_k: int = field(default=16, validator=[whole(0, 2**10), not_(in_([1]), msg=ONE)])


def is_dflash2(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a draft."""
    return has_class(config, CLASS)


def options_of(config: Mapping[str, Any]) -> tuple[DFlash2Options, tuple[int, ...]]:
    """The options and taps a config.json describes. CheckpointError where a key is missing or makes no sense.

    Published files have no key for what only training reads, nor for the anchor's slot, which predicts nothing there.
    """
    with reading("DFlash 2"):
        own = config["dflash_config"]
        every = {"num_anchors": 512, "sample_from_anchor": False, **config, **own}
        return DFlash2Options(**backbone_keys(every), **{key: own[key] for key in KEYS}), taps_of(own)
