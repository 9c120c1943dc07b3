"""Made-up rows for tests of loss terms and weightings: logits, labels, slots and extras, and statistics of any chunk.

This file knows what statistics are formed from. It does not know what reads them.

Legend: N rows, V the target's vocabulary, D the draft's (V if it is not reduced), U target positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.rows.reduced_vocabulary import ReducedVocabulary
from deepspec_core.rows.statistics import ChunkStats

V = 12
# Blocks of several lengths, as a batch has them: N rows in all. Some slots are not supervised.
SLOTS = ((0, 1, 2), (0,), (0, 1, 2, 3, 4, 5, 6), (0, 3), (0, 1, 2, 4))
N = sum(map(len, SLOTS))
# The tokens that a draft with a reduced vocabulary knows, and the same number of tokens counted from 0.
KNOWN = (1, 4, 5, 8, 9, 11)
FIRST = tuple(range(len(KNOWN)))
_EXTRAS = ("confidence_logits",)


@frozen(kw_only=True, eq=False)
class MadeRows:
    """Logits of rows, and everything else that statistics are formed from.

    With `known` the draft knows only these tokens. The target's log-normalisers are then larger by `beyond` than those
    of the known tokens' logits, because of the tokens that the draft does not know.
    """

    draft_ND: Tensor
    target_ND: Tensor
    ids_N: Tensor
    slot_N: Tensor
    block_N: Tensor
    extras: dict[str, Tensor]
    known: Sequence[int] | None = None
    beyond: float = 0.0

    def stats(self, part: slice = slice(None), *, target: bool = True, logits: bool = True) -> ChunkStats:
        """The statistics of the rows of one chunk."""
        draft_nD, target_nD = self.draft_ND[part], self.target_ND[part]
        reduced = None if self.known is None else ReducedVocabulary(torch.tensor(self.known), V)

        def whole() -> tuple[Tensor, Tensor]:
            assert reduced is not None
            return target_nD.logsumexp(-1) + self.beyond, reduced.tokens(target_nD.argmax(-1))

        return ChunkStats(
            base_logits_NV=draft_nD if logits else None,
            draft_logits_NV=draft_nD,
            target_logits_UV=target_nD if target else None,
            target_row_N=torch.arange(len(draft_nD)) if target else None,
            target_ids_N=self.ids_N[part],
            extras={name: extra[part] for name, extra in self.extras.items()},
            differentiable=True,
            reduced=reduced,
            whole=whole if target and reduced is not None else None,
        )

    def tensors(self) -> list[Tensor]:
        """Copies of all tensors."""
        return [part.detach().clone() for part in (self.draft_ND, self.target_ND, self.ids_N, *self.extras.values())]


def made_rows(
    extras: tuple[str, ...],
    *,
    sharpness: float = 1.0,
    seed: int = 0,
    known: Sequence[int] | None = None,
    unknown_label: int | None = None,
    beyond: float = 0.0,
) -> MadeRows:
    """Rows of a seed. With `known`, labels are among these tokens, except `unknown_label` at every third row."""
    generator = torch.Generator().manual_seed(seed)
    size = V if known is None else len(known)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    draft_ND, target_ND = (drawn(N, size) * sharpness).requires_grad_(), drawn(N, size) * sharpness
    ids_N = torch.randint(0, size, (N,), generator=generator)
    if known is not None:
        ids_N = torch.tensor(known)[ids_N]
    if unknown_label is not None:
        ids_N[::3] = unknown_label
    return MadeRows(
        draft_ND=draft_ND,
        target_ND=target_ND,
        ids_N=ids_N,
        slot_N=torch.tensor([slot for slots in SLOTS for slot in slots]),
        block_N=torch.arange(len(SLOTS)).repeat_interleave(torch.tensor([len(slots) for slots in SLOTS])),
        extras={name: drawn(N).requires_grad_() for name in dict.fromkeys((*_EXTRAS, *extras))},
        known=known,
        beyond=beyond,
    )
