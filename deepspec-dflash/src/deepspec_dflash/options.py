"""The options of `[draft] type = "dflash"`, and how they are read back from a checkpoint's config.json.

Imports attrs, core's bounds and core's errors only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from attrs import Attribute, field, frozen
from attrs.validators import instance_of, optional

from deepspec_core.config.bounds import whole
from deepspec_core.errors import CheckpointError

__all__ = ["DFlashOptions", "backbone_keys", "has_class", "is_dflash", "reading", "taps_of"]


def _leaves_a_prediction(options: DFlashOptions, _attribute: Attribute[bool], anchor_predicts: bool) -> None:
    if not anchor_predicts and options.block_size < 2:
        raise ValueError("'block_size' must be > 1 where the anchor's slot predicts nothing")


@frozen(kw_only=True)
class DFlashOptions:
    """The options of a DFlash draft.

    block_size: The number of slots in a block, including the anchor's.
    num_layers: The number of decoder layers of the draft.
    num_anchors: The number of blocks drawn in each training sequence.
    mask_token_id: The token that fills the slots after the anchor. Left out: the target's own mask token.
    anchor_predicts: If true, every slot, also the anchor's, predicts the token after its own position. If false, the
        anchor's slot predicts nothing, and every other slot predicts the token at its own position, as in the original
        DFlash.
    vocab_size: The number of tokens that the draft can propose: the most frequent ones in the run's answers. With
        fewer tokens, a round takes less time. Left out: the target's vocabulary.
    """

    block_size: int = field(default=7, validator=whole(1, 1024))
    num_layers: int = field(default=5, validator=whole(1, 256))
    num_anchors: int = field(default=512, validator=whole(1, 2**20))
    mask_token_id: int | None = field(default=None, validator=optional(whole(0)))
    anchor_predicts: bool = field(default=True, validator=[instance_of(bool), _leaves_a_prediction])
    vocab_size: int | None = field(default=None, validator=optional(whole(1, 2**31)))

    @property
    def num_predictions(self) -> int:
        """The number of tokens that a block predicts."""
        return self.block_size if self.anchor_predicts else self.block_size - 1


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a DFlash draft's. DFlash drafts are published as DSpark models without the two heads."""
    return (
        has_class(config, "DSparkModel") and not config.get("markov_rank") and not config.get("enable_confidence_head")
    )


def has_class(config: Mapping[str, Any], suffix: str) -> bool:
    """Whether a config.json names classes, and the name of each ends with `suffix`."""
    names = config.get("architectures")
    return isinstance(names, list) and bool(names) and all(str(name).endswith(suffix) for name in names)


def options_of(config: Mapping[str, Any]) -> tuple[DFlashOptions, tuple[int, ...]]:
    """The options and taps a config.json describes. CheckpointError where a key is missing or makes no sense."""
    with reading("DFlash"):
        return DFlashOptions(**backbone_keys(config)), taps_of(config)


def backbone_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's values of the options above, for any draft on this backbone. KeyError where one is missing."""
    return {
        "block_size": config["block_size"],
        "num_layers": config["num_hidden_layers"],
        "num_anchors": config["num_anchors"],
        "mask_token_id": config["mask_token_id"],
        "anchor_predicts": config.get("sample_from_anchor", True),
        "vocab_size": config.get("draft_vocab_size"),
    }


def taps_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The target layers a config.json names. KeyError or TypeError where it does not."""
    return tuple(config["target_layer_ids"])


@contextmanager
def reading(title: str) -> Iterator[None]:
    """Turn what is wrong with a config.json into CheckpointError; `title` names the draft it should describe."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(
            f"config.json lacks a key of a {title} draft", where="config.json", expected=error
        ) from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json does not describe a {title} draft", where="config.json", found=error.args[0]
        ) from None
