"""What `[draft] type = "dflash"` may say, and how the same is read back from a checkpoint's config.json.

Imports attrs and core's errors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen
from attrs.validators import ge, gt, instance_of, optional

from deepspec_core.errors import CheckpointError


@frozen(kw_only=True)
class DFlashOptions:
    """The options of a DFlash draft.

    `block_size`: tokens proposed a round, the anchor's slot included. `num_layers`: draft layers. `num_anchors`: blocks
    drawn per training sequence. `mask_token_id`: fills the slots after the anchor; the target's own where left out.
    """

    block_size: int = field(default=7, validator=[instance_of(int), gt(0)])
    num_layers: int = field(default=5, validator=[instance_of(int), gt(0)])
    num_anchors: int = field(default=512, validator=[instance_of(int), gt(0)])
    mask_token_id: int | None = field(default=None, validator=optional([instance_of(int), ge(0)]))


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a DFlash draft: published as a DSpark model without its two heads."""
    names = config.get("architectures") or ()
    return (
        any(str(name).endswith("DSparkModel") for name in names)
        and not config.get("markov_rank")
        and not config.get("enable_confidence_head")
    )


def options_of(config: Mapping[str, Any]) -> tuple[DFlashOptions, tuple[int, ...]]:
    """The options and taps a config.json describes. CheckpointError where a key is missing or makes no sense."""
    try:
        options = DFlashOptions(
            block_size=config["block_size"],
            num_layers=config["num_hidden_layers"],
            num_anchors=config["num_anchors"],
            mask_token_id=config["mask_token_id"],
        )
        return options, tuple(int(layer) for layer in config["target_layer_ids"])
    except KeyError as error:
        raise CheckpointError(
            "config.json lacks a key of a DFlash draft", where="config.json", expected=error
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "config.json does not describe a DFlash draft", where="config.json", found=error.args[0]
        ) from None
