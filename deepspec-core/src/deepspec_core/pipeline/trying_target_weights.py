"""Checks, before a run's first stage, that the target has the weights that the draft needs, and that they fit.

Knows their names and shapes, from the headers of the target's files. Reads no weight.
"""

from __future__ import annotations

import logging

import torch

from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.estimating.memory import fake_tensors, without_torch_messages
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.trying import reads_numbers
from deepspec_core.plugins.references import FAILURES, blame

log = logging.getLogger("deepspec")


def try_target_weights(run: Run, draft: DraftModel, description: DraftDescription) -> None:
    """Hand the draft, which is on fake tensors, fake weights of the target's shapes.

    Raises TargetError if the target has none of those names. Raises PluginError if the draft does not take them.
    """
    if not description.target_weights:
        return
    from deepspec_core.targets.opening import extra_weights_before

    revision = run.file.target.revision
    found = extra_weights_before(run.target.where, description.target_weights, revision=revision)
    if found is None:
        log.info("whether the target's extra weights fit the draft is checked after the target's download")
        return
    try:
        with fake_tensors(), without_torch_messages(), torch.no_grad():
            draft.adopt_weights({name: torch.empty(one.shape, dtype=one.dtype) for name, one in found.items()})
    except DeepSpecError:
        raise
    except FAILURES as error:
        if reads_numbers(error):
            log.info(
                "adopt_weights of the draft was not tried before the run, because it reads values of tensors (%s)",
                blame(error),
            )
            return
        kind = run.file.draft.type
        raise PluginError(
            f"draft type {kind!r} fails to adopt weights of the target",
            where=run.plugins.registry.provider("draft", kind),
            found=blame(error),
            expected=f"it takes {', '.join(f'{name} {list(one.shape)}' for name, one in sorted(found.items())[:5])}",
        ) from error
