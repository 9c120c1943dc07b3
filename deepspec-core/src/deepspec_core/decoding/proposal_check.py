"""Checks whether a proposal can be verified: shapes, dtypes, ranges, and whether probabilities are distributions.

Shapes are known on the host, and wrong ones are refused at once. Values are on the device. They are clamped into range,
so that the round can continue, and the result of the check is read together with the values that the engine reads once
per round anyway. So no round waits for the device a second time, and no token of a refused round is committed.

Knows proposals. Does not know rounds, targets or any algorithm.

Legend: B slots, K draft tokens at most (in a tree: nodes), V vocabulary, R numbers that are read of a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.proposer import Proposal, Proposer, Sampling
from deepspec_core.decoding.out_of_memory import is_out_of_memory
from deepspec_core.decoding.sampling import mass_before
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.plugins.origin import component_of, package_of
from deepspec_core.plugins.references import FAILURES, blame

# How far a sum may be away from 1: as far as bf16 can round all numbers of a distribution, by one part in 257.
_SUM = 2.0**-8
# How far a token may be away from where its uniform number falls, in the cumulative distribution. A plugin may form
# fp32 sums over a large vocabulary in another order. In bf16 the tolerance also tells that numbers were rounded after
# the draw.
_PLACE, _PLACE_BF16 = 1e-3, 2e-5


@frozen(kw_only=True, eq=False)
class Checked:
    """A proposal clamped into range, the proposal as it came, and the numbers that `refuse` reads: [B, R] int64."""

    proposal: Proposal
    given: Proposal
    to_read: Tensor


class ProposerFailedError(PluginError):
    """A proposer raised an error. It did not return a wrong proposal, so one sample may be the cause."""


class ProposalCheck:
    """Checks the proposals of one decoding, in the order of its rounds.

    `max_tokens`, `max_nodes` (without it: max_tokens) and `taps` are read once. Raises PluginError if they are no
    numbers of tokens and layers.
    """

    def __init__(self, proposer: Proposer, *, vocab_size: int) -> None:
        self.proposer, self.vocab_size = proposer, vocab_size
        self.max_tokens, self.taps = proposer.max_tokens, tuple(proposer.taps)
        self.max_nodes = getattr(proposer, "max_nodes", self.max_tokens)
        for name in ("max_tokens", "max_nodes"):
            if type(number := getattr(self, name)) is not int or number < 0:
                raise self._refused(name, repr(number), "a whole number, 0 or above")
        if any(type(tap) is not int for tap in self.taps):
            raise self._refused("taps", repr(self.taps), "layer numbers")

    def __call__(self, proposal: Proposal, *, slots_B: Tensor, sampling: Sampling, uniforms_BK: Tensor) -> Checked:
        """The next round's proposal for these slots, drawn with these uniforms. Does not wait for the device.

        Raises PluginError if its shapes or kinds of numbers are not those of the contract.
        """
        self._shapes(proposal, slots_B)
        num_draft = proposal.tokens.shape[1]
        tokens_BK = proposal.tokens.clamp(0, self.vocab_size - 1)
        to_read = [proposal.lengths[:, None], proposal.tokens]
        parents_BK = None
        if proposal.parents is not None:
            to_read.append(proposal.parents)
            before_K = torch.arange(num_draft, device=tokens_BK.device) - 1
            parents_BK = torch.minimum(proposal.parents.clamp(min=-1), before_K)
        if proposal.confidence is not None:
            to_read.append(proposal.confidence.isfinite())
        # At temperature 0 probabilities are not read. Without any, each token stands for itself.
        if proposal.probabilities is not None and sampling.temperature > 0:
            q_BK = proposal.probabilities.gather(2, tokens_BK[..., None])[..., 0]
            before_BK, total_BK = mass_before(proposal.probabilities, tokens_BK)
            at_BK = uniforms_BK[:, :num_draft].double() * total_BK
            away = _PLACE_BF16 if proposal.probabilities.dtype == torch.bfloat16 else _PLACE
            to_read += [
                (q_BK > 0) & (q_BK <= 1 + _SUM),
                (total_BK - 1).abs() <= _SUM,
                proposal.probabilities.amin(2) >= 0,
                # Each token is where its uniform number falls in the cumulative distribution, up to rounding.
                (before_BK - away <= at_BK) & (at_BK <= before_BK + q_BK + away),
            ]
        return Checked(
            proposal=evolve(
                proposal, tokens=tokens_BK, lengths=proposal.lengths.clamp(0, num_draft), parents=parents_BK
            ),
            given=proposal,
            to_read=torch.cat(to_read, dim=1),
        )

    def refuse(self, checked: Checked, read: Sequence[Sequence[int]]) -> None:
        """PluginError if a number of the proposal is out of place. `read` holds `checked.to_read`, slot by slot."""
        given, num_draft = checked.given, checked.given.tokens.shape[1]
        for row, (length, *numbers) in enumerate(read):
            where = f"in row {row}"
            if not 0 <= length <= num_draft:
                raise self._refused("lengths", f"{length}, {where}", f"from 0 to the number of columns, {num_draft}")
            tokens = numbers[:length]
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise self._refused("tokens", f"{token}, {where}", f"token ids from 0 to below {self.vocab_size}")
            if given.parents is not None:
                self._refuse_tree(tokens, numbers[num_draft : num_draft + length], row)
                continue
            faults = _FAULTS if given.confidence is None else (_CONFIDENCE, *_FAULTS)
            for number, fault in enumerate(faults[: len(numbers) // max(num_draft, 1) - 1], start=1):
                start = number * num_draft
                if not all(numbers[start : start + length]):
                    found = fault.found(given, row, numbers[start : start + length].index(0))
                    raise self._refused(fault.field, f"{found}, {where}", fault.expected)

    def _refuse_tree(self, tokens: Sequence[int], parents: Sequence[int], row: int) -> None:
        depths = {-1: 0}
        siblings: set[tuple[int, int]] = set()
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            found = f"{parent} of node {node}, in row {row}"
            if not -1 <= parent < node:
                raise self._refused("parents", found, "a column before the node's own, or -1")
            depths[node] = depths[parent] + 1
            if depths[node] > self.max_tokens:
                raise self._refused("parents", found, f"paths of at most {self.max_tokens} tokens, the max_tokens")
            if (parent, token) in siblings:
                raise self._refused(
                    "tokens", f"token {token} twice after node {parent}, in row {row}", "other siblings"
                )
            siblings.add((parent, token))

    @contextmanager
    def calling(self, method: str) -> Iterator[None]:
        """Within it the proposer's method runs. Raises ProposerFailedError, with its name, if that raises anything but
        our errors, or that memory ran out.
        """
        try:
            yield
        except DeepSpecError:
            raise
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise ProposerFailedError(
                f"a proposer failed in {method}()",
                where=f"{package_of(self.proposer)}, {component_of(self.proposer)}",
                found=blame(error),
            ) from error

    def _shapes(self, proposal: Any, slots_B: Tensor) -> None:
        if not isinstance(proposal, Proposal):
            raise self._refused("propose()", type(proposal).__name__, "a contracts.proposer.Proposal")
        batch, tokens = len(slots_B), proposal.tokens
        most = self.max_tokens if proposal.parents is None else self.max_nodes
        if not _is(tokens, 2, torch.int64) or len(tokens) != batch or tokens.shape[1] > most:
            raise self._refused("tokens", _kind(tokens), f"[{batch}, at most {most}], torch.int64")
        chain, vocabulary = tuple(tokens.shape), self.vocab_size
        if not _is(proposal.lengths, 1, torch.int64) or len(proposal.lengths) != batch:
            raise self._refused("lengths", _kind(proposal.lengths), f"[{batch}], torch.int64")
        q = proposal.probabilities
        kinds = (torch.float32, torch.float64, torch.bfloat16)
        if q is not None and (not _is(q, 3, *kinds) or tuple(q.shape) != (*chain, vocabulary)):
            expected = f"[{batch}, {chain[1]}, {vocabulary}], torch.float32 or torch.bfloat16"
            raise self._refused("probabilities", _kind(q), expected)
        sure = proposal.confidence
        if sure is not None and (not _is(sure, 2) or not sure.is_floating_point() or tuple(sure.shape) != chain):
            raise self._refused("confidence", _kind(sure), f"[{batch}, {chain[1]}], of a floating-point type")
        parents = proposal.parents
        if parents is not None and (not _is(parents, 2, torch.int64) or tuple(parents.shape) != chain):
            raise self._refused("parents", _kind(parents), f"[{batch}, {chain[1]}], torch.int64")
        for field in ("probabilities", "confidence"):
            if parents is not None and getattr(proposal, field) is not None:
                raise self._refused(field, f"a tree with {field}", "None: the verification of a tree does not read it")
        for field in ("tokens", "lengths", "probabilities", "confidence", "parents"):
            value = getattr(proposal, field)
            if value is not None and value.device != slots_B.device:
                raise self._refused(field, f"a tensor on {value.device}", f"one on {slots_B.device}, as the slots")

    def _refused(self, field: str, found: str, expected: str) -> PluginError:
        return _refused(self.proposer, field, found, expected)


def refuse_confidence(proposer: Proposer, proposal: Proposal) -> None:
    """PluginError if the confidence in a proposed token is not finite. Waits for the device.

    For what cuts a proposal by its confidence before the check: a cut would hide the number.
    """
    assert proposal.confidence is not None
    lengths, sure = proposal.lengths.tolist(), proposal.confidence.tolist()
    for row, (length, values) in enumerate(zip(lengths, sure, strict=True)):
        if not all(map(math.isfinite, values[:length])):
            column = [math.isfinite(value) for value in values].index(False)
            raise _refused(
                proposer, _CONFIDENCE.field, f"{values[column]:g}, in row {row}", expected=_CONFIDENCE.expected
            )


def _refused(proposer: Proposer, field: str, found: str, expected: str) -> PluginError:
    return PluginError(
        f"a proposer returns what cannot be verified: `{field}`",
        where=f"{package_of(proposer)}, {component_of(proposer)}",
        found=found,
        expected=expected,
        fix="Correct the proposer, or leave its plugin out. No output was changed.",
    )


@frozen
class _Fault:
    """A field, what is expected of it, and how a message describes the value in a slot's column."""

    field: str
    expected: str
    found: Callable[[Proposal, int, int], str]


def _at_token(proposal: Proposal, row: int, column: int) -> str:
    assert proposal.probabilities is not None
    token = int(proposal.tokens[row, column])
    return f"{proposal.probabilities[row, column, token].item():g} at token {token}"


def _sum(proposal: Proposal, row: int, column: int) -> str:
    assert proposal.probabilities is not None
    return f"a sum of {proposal.probabilities[row, column].sum().item():g}"


def _least(proposal: Proposal, row: int, column: int) -> str:
    assert proposal.probabilities is not None
    return f"{proposal.probabilities[row, column].min().item():g}"


def _sure(proposal: Proposal, row: int, column: int) -> str:
    assert proposal.confidence is not None
    return f"{proposal.confidence[row, column].item():g}"


def _token(proposal: Proposal, row: int, column: int) -> str:
    return f"token {int(proposal.tokens[row, column])}, which column {column} of the uniforms does not give"


_DISTRIBUTIONS = "probabilities of every token of the vocabulary, whose sum is 1; not logits, and no logarithms"
_CONFIDENCE = _Fault("confidence", "finite logits", _sure)
# In the order of the columns that are read after the tokens and the confidence.
_FAULTS = (
    _Fault("probabilities", "above 0 at the token that was drawn: " + _DISTRIBUTIONS, _at_token),
    _Fault("probabilities", _DISTRIBUTIONS, _sum),
    _Fault("probabilities", _DISTRIBUTIONS, _least),
    _Fault(
        "tokens",
        "column k drawn from column k of `probabilities` with column k of the uniforms (decoding.sampling.draw); "
        "where tokens are chosen otherwise, `probabilities` is None",
        _token,
    ),
)


def _is(value: Any, dimensions: int, *dtypes: torch.dtype) -> bool:
    return isinstance(value, Tensor) and value.dim() == dimensions and (not dtypes or value.dtype in dtypes)


def _kind(value: Any) -> str:
    return f"{list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
