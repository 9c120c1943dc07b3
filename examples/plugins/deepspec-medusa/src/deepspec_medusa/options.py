"""The options of a Medusa draft, and how they are read back from its config.json. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from deepspec_core.config.bounds import whole


@frozen(kw_only=True)
class MedusaOptions:
    """A residual block and a vocabulary head for each of the next tokens.

    num_heads: Tokens of one proposal. Each head has as many trained weights as the target's lm_head, and a little more.
    num_anchors: Positions of each training sequence that the heads are trained at.
    """

    num_heads: int = field(default=4, validator=whole(1, 64))
    num_anchors: int = field(default=512, validator=whole(1, 2**20))


def is_medusa(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a draft."""
    return any(str(name).endswith("MedusaModel") for name in config.get("architectures") or ())


def options_of(config: Mapping[str, Any]) -> tuple[MedusaOptions, tuple[int, ...]]:
    """The options and the tapped layers."""
    options = MedusaOptions(num_heads=config["medusa_num_heads"], num_anchors=config["num_anchors"])
    return options, tuple(config["target_layer_ids"])
