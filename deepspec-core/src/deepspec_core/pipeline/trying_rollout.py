"""Tries, before a run's first stage, the rollout of a draft that trains on its own texts. Knows runs; trains nothing.

Legend: B samples, T tokens.
"""

from __future__ import annotations

import logging

import torch

from deepspec_core.config.schema import CACHED, SERVER
from deepspec_core.contracts.draft import DraftModel, Texts
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.estimating.memory import fake_tensors, without_torch_messages
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.trying import reads_numbers
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.training.on_policy import check_shapes, rolls_out, stored_features

log = logging.getLogger("deepspec")
_BATCH, _LENGTH = 2, 32


def try_rollout(run: Run, draft: DraftModel) -> None:
    """Roll out once, where the draft does, on fake tensors.

    Raises ConfigError if the run's features are stored. Raises PluginError, with the package, if the draft fails or
    returns texts of another shape.
    """
    if not rolls_out(draft):
        return
    mode = run.file.features.mode
    if mode in (CACHED, SERVER):
        raise stored_features(f"{run.path}: features.mode", f'"{mode}"')
    try:
        with fake_tensors(), without_torch_messages(), torch.no_grad():
            given = Texts(
                input_ids=torch.zeros(_BATCH, _LENGTH, dtype=torch.long),
                loss_mask=torch.ones(_BATCH, _LENGTH, dtype=torch.bool),
                attention_mask=torch.ones(_BATCH, _LENGTH, dtype=torch.bool),
            )
            check_shapes(draft, draft.rollout(given, torch.zeros(_BATCH, _LENGTH, dtype=torch.float64)), given)
    except DeepSpecError:
        raise
    except FAILURES as error:
        if reads_numbers(error):
            log.info(
                "the draft's rollout was not tried before the run, because it reads values of tensors (%s)",
                blame(error),
            )
            return
        kind = run.file.draft.type
        raise PluginError(
            f"draft type {kind!r} fails to roll out made-up texts",
            where=run.plugins.registry.provider("draft", kind),
            found=blame(error),
        ) from error
