"""The optimizers that [train] optimizer names: AdamW, and Muon for matrices with AdamW for all else.

Muon (Jordan et al., 2024; arXiv 2502.16982) moves a matrix by its averaged gradient with all singular values made about
equal. Such a step is for matrices that map hidden states to hidden states. An embedding, a head over the vocabulary, a
projection to one number, a bias and a norm are no such matrices. Knows parameters and torch's optimizers. Does not know
training or files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Final

import torch
from torch import Tensor, nn

from deepspec_core.config.train_options import ADAMW, MUON, TrainOptions
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import ConfigError
from deepspec_core.training.muon_in_float32 import MuonInFloat32, has_bf16_instructions

log = logging.getLogger("deepspec")

_EPS: Final = 1e-8
# torch's default, and that of Muon's authors.
_MOMENTUM: Final = 0.95


def build_optimizer(
    trained: Mapping[str, Tensor], options: TrainOptions, *, matrices: Set[str], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of a draft's trained parameters, given by name. `matrices` are those that Muon may train.

    Raises ConfigError if Muon is asked for and there is none.
    """
    if options.optimizer != MUON:
        return _adamw(trained.values(), options, fused=fused)
    hidden = [value for name, value in trained.items() if name in matrices]
    others = [value for name, value in trained.items() if name not in matrices]
    if not hidden:
        raise no_matrices(len(trained))
    log.info(
        "optimizer: Muon for %d matrices (%s parameters), AdamW for %d other weights (%s parameters)",
        len(hidden),
        f"{sum(value.numel() for value in hidden):,}",
        len(others),
        f"{sum(value.numel() for value in others):,}",
    )
    return MuonWithAdamW(hidden, others, options, fused=fused)


def hidden_matrices(draft: DraftModel) -> frozenset[str]:
    """The names of the trained weights of linear layers between hidden states.

    What a layer is for decides, not how large it is. Of embeddings are all weights of `embed_tokens` and of
    nn.Embedding. Of heads over the vocabulary are the weights of `lm_head`, and those that `heads()` gives or forms its
    tensors of. A layer from or to one number is refused by its shape. A plain parameter of a module is no linear layer.

    To be asked before the draft's weights are spread over processes, since a draft may form its heads of them.
    """
    refused = {id(weight) for part in (draft.embed_tokens, draft.lm_head) for weight in part.parameters()}
    refused |= {id(part.weight) for part in draft.modules() if isinstance(part, nn.Embedding)}
    with torch.enable_grad():
        heads = draft.heads()
    for head in (heads.draft, heads.target, heads.correction):
        if head is not None:
            refused |= _formed_of(head)
    linear = {id(part.weight) for part in draft.modules() if isinstance(part, nn.Linear)}
    return frozenset(
        name
        for name, value in draft.named_parameters()
        if value.requires_grad and id(value) in linear - refused and 1 not in value.shape
    )


def _formed_of(tensor: Tensor) -> set[int]:
    """The ids of the trained weights that a tensor is, or is computed from."""
    found, seen, ahead = {id(tensor)}, set[Any](), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [before for before, _ in node.next_functions]
    return found


def no_matrices(trained: int) -> ConfigError:
    """The error of a run that asks for Muon, and whose draft has this many trained parameters, none of them for it."""
    return ConfigError(
        "the draft has no matrix that Muon could train",
        where="train.optimizer",
        found=f'"{MUON}", and {trained} trained parameters, no linear layer between hidden states among them',
        expected='a draft with linear layers between hidden states, or "adamw"',
    )


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """What [train] calls it."""
    return MUON if isinstance(optimizer, MuonWithAdamW) else ADAMW


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for `matrices` and its AdamW for `others`, as one optimizer: its groups are theirs, in that order.

    Both have the learning rate and the weight decay of AdamW: Muon's step is scaled to the size that AdamW's has
    (arXiv 2502.16982, section 2.2), so one schedule serves both. torch orthogonalises in bfloat16, whatever the dtype
    of the weights; a CPU without instructions for it does so in fp32.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], options: TrainOptions, *, fused: bool) -> None:
        of = torch.optim.Muon if has_bf16_instructions(matrices[0].device) else MuonInFloat32
        muon = of(
            matrices,
            lr=options.lr,
            weight_decay=options.weight_decay,
            momentum=_MOMENTUM,
            adjust_lr_fn="match_rms_adamw",
        )
        self._parts: list[torch.optim.Optimizer] = [muon]
        if others:
            self._parts.append(_adamw(others, options, fused=fused))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """Let the parts work on this optimizer's state and groups, which loading replaces."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, for both parts."""
        super().load_state_dict(state_dict)
        self._join()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "gradients are there"
        for part in self._parts:
            part.step()


def _adamw(parameters: Iterable[Tensor], options: TrainOptions, *, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=_EPS,
        weight_decay=options.weight_decay,
        fused=fused,
    )
