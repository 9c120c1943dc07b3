"""The options of `[draft] type = "dspark"`, and how they are read back from a checkpoint's config.json.

Imports attrs, core's errors and the backbone's options only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_, instance_of

from deepspec_core.config.bounds import whole
from deepspec_dflash.options import DFlashOptions, backbone_keys, has_class, is_dflash, reading, taps_of

HEADS = ("vanilla", "gated", "rnn")
GRADIENTS = ("through", "stop")


@frozen(kw_only=True)
class MarkovOptions:
    """The Markov head of a DSpark draft.

    rank: The rank of the matrix that corrects the logits; 0: no Markov head.
    head: The input of the correction. "vanilla": the previous token. "gated": also the backbone's output. "rnn":
        also every earlier token of the block.
    """

    rank: int = field(default=256, validator=whole(0, 2**16))
    head: Literal["vanilla", "gated", "rnn"] = field(default="vanilla", validator=in_(HEADS))


def _has_features(options: DSparkOptions, _attribute: Attribute[bool], with_markov: bool) -> None:
    if options.confidence_head and with_markov and not options.markov.rank:
        raise ValueError("'confidence_with_markov' must be false without a Markov head (markov.rank = 0)")


def _has_a_head(options: DSparkOptions, _attribute: Attribute[bool], confidence_head: bool) -> None:
    if not confidence_head and not options.markov.rank:
        raise ValueError("'confidence_head' must be true where markov.rank = 0: with neither, this is type \"dflash\"")


@frozen(kw_only=True)
class DSparkOptions(DFlashOptions):
    """The options of a DSpark draft: those of its backbone (as of "dflash") and of its two heads.

    markov: The Markov head, which corrects each slot's logits by the token before it.
    confidence_head: Whether the draft has a confidence head, which predicts the acceptance of its own tokens.
    confidence_with_markov: Whether the confidence head also reads the previous token's Markov embedding.
    confidence_gradient: "through": the confidence loss trains the backbone too, as published. "stop": it trains only
        the confidence head.
    """

    markov: MarkovOptions = field(factory=MarkovOptions)
    confidence_head: bool = field(default=True, validator=[instance_of(bool), _has_a_head])
    confidence_with_markov: bool = field(default=True, validator=[instance_of(bool), _has_features])
    confidence_gradient: Literal["through", "stop"] = field(default="through", validator=in_(GRADIENTS))


def is_dspark(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a DSpark draft: the class name with at least one of the two heads."""
    return has_class(config, "DSparkModel") and not is_dflash(config)


def options_of(config: Mapping[str, Any]) -> tuple[DSparkOptions, tuple[int, ...]]:
    """The options and taps a config.json describes. CheckpointError where a key is missing or makes no sense.

    `confidence_gradient` concerns training only, so no checkpoint has it: its default comes back.
    """
    with reading("DSpark"):
        rank, confidence_head = config["markov_rank"], config["enable_confidence_head"]
        options = DSparkOptions(
            **backbone_keys(config),
            markov=MarkovOptions(rank=rank, head=config["markov_head_type"]) if rank else MarkovOptions(rank=0),
            confidence_head=confidence_head,
            confidence_with_markov=config["confidence_head_with_markov"] if confidence_head else False,
        )
        return options, taps_of(config)
