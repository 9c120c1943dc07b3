"""A proposer of trees for tests: as many shapes as possible, drawn from a fixed random table.

Legend: B slots in a call, M nodes at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.testing.table_proposer import TableProposer

__all__ = ["TreeTableProposer"]


class TreeTableProposer(TableProposer):
    """A proposer whose trees depend only on the last committed token: on the slot and the round, too, if `stop_short`.

    The parent of each node is a random earlier node, or the last committed token. The node takes the likeliest token
    after its parent, by the table, that no sibling has. `max_nodes` is the number of nodes. With `stop_short`, trees
    have fewer nodes, their sizes differ, and some are empty.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        max_nodes: int,
        taps: tuple[int, ...] = (0,),
        seed: int = 0,
        stop_short: bool = False,
    ) -> None:
        super().__init__(vocab_size=vocab_size, max_tokens=max_tokens, taps=taps, seed=seed, stop_short=stop_short)
        self.max_nodes, self.seed = max_nodes, seed
        self.trees: dict[tuple[int, int, int], tuple[list[int], list[int]]] = {}
        self.likeliest_VV = self.logits_VV.argsort(1, descending=True).tolist()

    def propose(
        self, slots: Tensor, limits: Tensor, sampling: Sampling, uniforms: Tensor, stop_ids: Sequence[int]
    ) -> Proposal:
        """Propose a tree for each slot, with no path longer than its limit."""
        self.round += 1
        rows = []
        for slot, limit in zip(slots.tolist(), limits.tolist(), strict=True):
            turn = slot + self.round if self.stop_short else 0
            key = (self.last[slot], min(limit, self.max_tokens), turn)
            if key not in self.trees:
                self.trees[key] = self._tree(*key)
            rows.append(self.trees[key])
        tokens, parents = (
            torch.tensor([[*row[part], *[0] * (self.max_nodes - len(row[part]))] for row in rows]) for part in (0, 1)
        )
        lengths = torch.tensor([len(row[0]) for row in rows])
        if self.stop_short:
            lengths = torch.minimum(lengths, (slots + self.round) % (self.max_nodes + 1))
        return Proposal(tokens=tokens.long(), parents=parents.long(), lengths=lengths)

    def _tree(self, last: int, longest: int, turn: int) -> tuple[list[int], list[int]]:
        generator = torch.Generator().manual_seed(1 + self.seed + 1000 * last + 10**6 * turn)
        tokens: list[int] = []
        parents: list[int] = []
        depths, used = {-1: 0}, {-1: 0}
        while len(tokens) < self.max_nodes and longest > 0:
            parent = int(torch.randint(-1, len(tokens), (), generator=generator))
            before = last if parent < 0 else tokens[parent]
            if depths[parent] < longest and used[parent] < len(self.likeliest_VV[before]):
                node = len(tokens)
                tokens.append(self.likeliest_VV[before][used[parent]])
                parents.append(parent)
                used[parent] += 1
                depths[node], used[node] = depths[parent] + 1, 0
        return tokens, parents
