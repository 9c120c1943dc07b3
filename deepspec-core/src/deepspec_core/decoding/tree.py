"""Trees of proposed tokens as the target reads them, and their lossless verification.

In each slot the target draws the token after the last committed one from its own distribution. If a child of the node
has that token, the walk goes on there; if not, the token is committed as the target's own and the round ends. So every
committed token is the target's draw, whatever the tree is and however it was chosen: the rule needs no probabilities
of a draft (a tree that is chosen, as by its most probable paths, has none). At temperature 0 the draw is the argmax.
This file knows parents and distributions, and how the target gets a tree. It does not know proposers, or what a round
does with the outcome.

Legend: B slots, M nodes, T = M + 1 columns of the target (the last committed token, then the nodes), K tokens of a path
at most, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.target import TargetModel, TargetStep
from deepspec_core.decoding.sampling import pick
from deepspec_core.decoding.verify import Verdict, outcome


def score_tree(
    target: TargetModel,
    slots_B: Tensor,
    last_B: Tensor,
    position_B: Tensor,
    proposal: Proposal,
    taps: Sequence[int],
    *,
    sampling: Sampling,
    uniforms: Tensor,
    stop_ids: Sequence[int],
) -> tuple[Verdict, TargetStep]:
    """One pass of the target over a tree after the last committed tokens [B], which stand at the positions [B].

    Commits the accepted path to the target's cache. Gives the verdict and the pass with its features [B, K+1, ...] in
    the order of the path: those of the last committed token and the accepted ones, followed by anything.
    """
    assert proposal.parents is not None, "a chain"
    ids_BT = torch.cat([last_B[:, None], proposal.tokens], dim=1)
    sees_BTT = seen_columns(proposal.parents)
    depths_BT = sees_BTT.sum(2) - 1
    given_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) <= proposal.lengths[:, None]
    positions_BT = (position_B[:, None] + depths_BT).where(given_BT, -1)
    step = target.decode(slots_B, ids_BT, positions_BT, taps, sees=sees_BTT)
    verdict = verify_tree(step.logits, proposal, depths_BT, sampling=sampling, uniforms=uniforms, stop_ids=stop_ids)
    assert verdict.path is not None, "of a tree"
    target.commit(slots_B, position_B + verdict.committed, verdict.path)
    rows_B1 = torch.arange(len(verdict.path), device=ids_BT.device)[:, None]
    return verdict, evolve(
        step, hidden=step.hidden[rows_B1, verdict.path], last_hidden=step.last_hidden[rows_B1, verdict.path]
    )


def seen_columns(parents_BM: Tensor) -> Tensor:
    """[B, T, T], whether column t is or descends from column u. Parents must stand before their children."""
    width = parents_BM.shape[1] + 1
    parents_BT = torch.nn.functional.pad(parents_BM + 1, (1, 0), value=-1)
    same_TT = torch.eye(width, device=parents_BM.device)
    # Doubled until it spans the longest path there can be. Entries are 0 and 1, and sums of T of them exact.
    reach_BTT = same_TT + (parents_BT[..., None] == torch.arange(width, device=parents_BM.device)).float()
    for _ in range((width - 1).bit_length()):
        reach_BTT = (reach_BTT @ reach_BTT).clamp(max=1)
    return reach_BTT > 0


def verify_tree(
    logits_BTV: Tensor,
    proposal: Proposal,
    depths_BT: Tensor,
    *,
    sampling: Sampling,
    uniforms: Tensor,
    stop_ids: Sequence[int],
) -> Verdict:
    """Decide a round.

    logits [B, T, V] are the target's after each column, and depths [B, T] the lengths of the paths to the columns.
    Column k of the uniforms [B, K+1] in [0, 1) draws the k-th token of the path, so no draw depends on the tree.
    """
    tokens_BM, parents_BM = proposal.tokens, proposal.parents
    assert parents_BM is not None, "a chain"
    batch, num_nodes = tokens_BM.shape
    longest = uniforms.shape[1] - 1
    proposed_BM = torch.arange(num_nodes, device=tokens_BM.device) < proposal.lengths[:, None]
    best_BT = logits_BTV.argmax(-1) if sampling.temperature == 0 and sampling.seen is None else None
    at_B = torch.zeros(batch, dtype=torch.long, device=tokens_BM.device)
    rows_B = torch.arange(batch, device=tokens_BM.device)
    accepted_B, going_B1 = at_B, torch.ones(batch, 1, dtype=torch.bool, device=tokens_BM.device)
    drawn, path = [], [at_B]
    for k in range(longest + 1):
        if best_BT is not None:
            own_B = best_BT.gather(1, at_B[:, None])[:, 0]
        else:
            own_B = pick(logits_BTV[rows_B, at_B], sampling, uniforms[:, k])
            sampling = sampling.after(own_B)
        drawn.append(own_B)
        if k == longest or num_nodes == 0:
            break
        child_BM = (parents_BM == at_B[:, None] - 1) & (tokens_BM == own_B[:, None]) & proposed_BM & going_B1
        going_B1 = child_BM.any(1, keepdim=True)
        at_B = torch.where(going_B1[:, 0], child_BM.int().argmax(1) + 1, at_B)
        accepted_B = accepted_B + going_B1[:, 0]
        path.append(at_B)
    drawn_BK = torch.stack(drawn, dim=1)
    own_B = drawn_BK.gather(1, accepted_B[:, None])[:, 0]
    deepest_B = depths_BT[:, 1:].where(proposed_BM, 0).amax(1) if num_nodes else accepted_B
    return outcome(drawn_BK[:, :-1], accepted_B, own_B, deepest_B, stop_ids=stop_ids, path_BK=torch.stack(path, dim=1))
