"""The two parts of DFlash 2 by themselves: convolutions and selector against loops, and what training holds at once.

Legend: N blocks, S slots, H hidden size, t taps, G groups, R rows, C candidates, V vocabulary, r rank.
"""

import deepspec_dflash2.selector
import pytest
import torch
from attrs import evolve
from deepspec_dflash2.convolution import BlockConvolution, convolved
from deepspec_dflash2.loss import SelectorLoss
from deepspec_dflash2.options import DFlash2Options
from deepspec_dflash2.selector import CandidateSelector, candidates, logits_at
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.testing.tiny_family import tiny_adapter


def by_a_loop(x_NSH: Tensor, base_tH: Tensor, delta_NStG: Tensor) -> Tensor:
    """out[i, c] = sum over t of (base[t, c] + delta[i, t, g(c)]) x[i - t, c]."""
    out_NSH = torch.zeros_like(x_NSH)
    group = x_NSH.shape[2] // delta_NStG.shape[3]
    for n, i, c in torch.cartesian_prod(*map(torch.arange, x_NSH.shape)).tolist():
        for tap in range(min(len(base_tH), i + 1)):
            out_NSH[n, i, c] += (base_tH[tap, c] + delta_NStG[n, i, tap, c // group]) * x_NSH[n, i - tap, c]
    return out_NSH


@pytest.mark.parametrize("taps", [1, 2, 3, 6])
@pytest.mark.parametrize("slots", [1, 4])
def test_a_convolution_is_the_sum_of_its_definition(taps: int, slots: int) -> None:
    torch.manual_seed(0)
    x_NSH, base_tH = torch.randn(3, slots, 8).double(), torch.randn(taps, 8).double()
    delta_NStG = torch.randn(3, slots, taps, 2).double()
    torch.testing.assert_close(convolved(x_NSH, base_tH, delta_NStG), by_a_loop(x_NSH, base_tH, delta_NStG))


def test_both_convolutions_of_a_sublayer_follow_from_its_input() -> None:
    torch.manual_seed(0)
    around, x_NSH = BlockConvolution(8, taps=2, group=4).double(), torch.randn(2, 4, 8).double()
    weight_HH = torch.randn(8, 8).double()
    with torch.no_grad():
        for parameter in around.parameters():
            parameter.normal_()
    deltas = (x_NSH @ around.kernel_projection.weight.T).view(2, 4, 2, 2, 2)
    inner_NSH = by_a_loop(x_NSH, around.base_kernel[0], deltas[:, :, 0]) @ weight_HH
    expected = by_a_loop(inner_NSH, around.base_kernel[1], deltas[:, :, 1])
    torch.testing.assert_close(around(lambda x: x @ weight_HH)(x_NSH), expected)
    assert around.base_kernel.shape == (2, 2, 8)


def test_a_slot_reads_itself_and_the_one_before_in_its_own_block() -> None:
    torch.manual_seed(0)
    around = BlockConvolution(8, taps=2, group=4)
    with torch.no_grad():
        for parameter in around.parameters():
            parameter.normal_()
    x_NSH = torch.randn(3, 5, 8, requires_grad=True)
    out_NSH = convolved(x_NSH, around.base_kernel[0], around.kernel_projection(x_NSH).unflatten(-1, (4, 2))[:, :, :2])
    for block in range(3):
        for slot in range(5):
            (seen_NSH,) = torch.autograd.grad(out_NSH[block, slot].sum(), x_NSH, retain_graph=True)
            read = {tuple(place) for place in seen_NSH.abs().sum(-1).nonzero().tolist()}
            assert read == {(block, slot), (block, max(slot - 1, 0))}


def test_a_new_convolution_changes_nothing() -> None:
    x_NSH = torch.randn(2, 4, 32)
    assert torch.equal(BlockConvolution(32, taps=2, group=16)(torch.tanh)(x_NSH), torch.tanh(x_NSH))


def sizes(vocab_size: int) -> TargetArchitecture:
    """Of a target with H 8."""
    return evolve(tiny_adapter().architecture, hidden_size=8, vocab_size=vocab_size, initializer_range=0.5)


def made_selector(vocab_size: int = 12, rank: int = 5) -> CandidateSelector:
    torch.manual_seed(0)
    selector = CandidateSelector(sizes(vocab_size), rank).double()
    nn.init.normal_(selector.successor_codebook)
    return selector


def test_scores_are_those_of_a_loop_over_pairs() -> None:
    selector = made_selector()
    logits_KC, tokens_KC = torch.randn(3, 4).double(), torch.stack([torch.randperm(12)[:4] for _ in range(3)])
    hidden_KH = torch.randn(3, 8).double()
    a_Vr, b_Vr = selector.predecessor_codebook, selector.successor_codebook
    for before in range(12):
        scores_KC = selector(logits_KC, tokens_KC, hidden_KH, torch.full((3,), before))
        for slot in range(3):
            projected_r = selector.hidden_projection.weight @ hidden_KH[slot]
            for number, after in enumerate(tokens_KC[slot].tolist()):
                pair = sum(a_Vr[before, j] * projected_r[j] * b_Vr[after, j] for j in range(5))
                torch.testing.assert_close(scores_KC[slot, number], logits_KC[slot, number] + pair)


def test_a_new_selector_adds_nothing() -> None:
    logits_KC = torch.randn(3, 4)
    tokens_KC, before_K = torch.randint(12, (3, 4)), torch.randint(12, (3,))
    assert torch.equal(CandidateSelector(sizes(12), 5)(logits_KC, tokens_KC, torch.randn(3, 8), before_K), logits_KC)


def test_a_missing_label_takes_the_place_of_the_least_probable() -> None:
    logits_V = torch.tensor([0.0, 1.0, 9.0, 2.0, 8.0, 3.0, 4.0, 7.0])  # in order: 2, 4, 7, 6, 5, 3, 1, 0
    found = candidates(torch.zeros(3, 8), torch.tensor([4, 5, 7]), lambda h: h + logits_V, most=3, vocab_size=8)
    assert found.tolist() == [[2, 4, 7], [2, 4, 5], [2, 4, 7]]


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_candidates_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(deepspec_dflash2.selector, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    head, hidden_RH = nn.Linear(8, 12, bias=False).double().requires_grad_(False), torch.randn(7, 8).double()
    logits_RC, tokens_RC = head(hidden_RH).topk(4)
    assert torch.equal(candidates(hidden_RH, tokens_RC[:, 2], head, most=4, vocab_size=12), tokens_RC)
    hidden_RH.requires_grad_()
    found_RC = logits_at(tokens_RC, hidden_RH, head.weight)
    torch.testing.assert_close(found_RC, logits_RC)
    assert torch.autograd.gradcheck(lambda h: logits_at(tokens_RC, h, head.weight), hidden_RH)


class Stats:
    """The part of contracts.loss.RowStats that the term reads."""

    def __init__(self, scores_RC: Tensor, tokens_RC: Tensor, target_ids: Tensor) -> None:
        self.extras, self.target_ids = {"selector_scores": scores_RC, "selector_tokens": tokens_RC}, target_ids


def test_the_loss_and_its_gradients() -> None:
    """Against a loop, and of hidden states and all weights against finite differences, in float64."""
    selector, head = made_selector(), nn.Linear(8, 12, bias=False).double().requires_grad_(False)
    hidden_RH, labels_R = torch.randn(4, 8).double(), torch.randint(12, (4,))
    previous_R = torch.randint(12, (4,))
    tokens_RC = candidates(hidden_RH, labels_R, head, most=3, vocab_size=12)

    def loss(hidden_RH: Tensor, *weights: Tensor) -> Tensor:
        given = dict(zip(dict(selector.named_parameters()), weights, strict=True))
        inputs = (logits_at(tokens_RC, hidden_RH, head.weight), tokens_RC, hidden_RH, previous_R)
        scores_RC = torch.func.functional_call(selector, given, inputs)
        stats = Stats(scores_RC, tokens_RC, labels_R)
        expected = [
            -log_softmax(scores_C, 0)[tokens_C.tolist().index(label)]
            for scores_C, tokens_C, label in zip(scores_RC, tokens_RC, labels_R.tolist(), strict=True)
        ]
        found_R = SelectorLoss()(stats)  # type: ignore[arg-type]
        torch.testing.assert_close(found_R, torch.stack(expected).float())
        return torch.stack(expected).sum()

    assert torch.autograd.gradcheck(loss, (hidden_RH.requires_grad_(), *selector.parameters()))


class Largest(TorchDispatchMode):
    """The most numbers that any result has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.untyped_storage().nbytes() >= one.nbytes:
                self.most = max(self.most, one.numel())
        return result


def test_training_never_holds_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: a tensor has at most the numbers of the head or a codebook, of R C r, or of a chunk."""
    monkeypatch.setattr(deepspec_dflash2.selector, "_AT_ONCE", 4000)
    head, selector = nn.Linear(8, 1000, bias=False).requires_grad_(False), CandidateSelector(sizes(1000), 4)
    hidden_RH = torch.randn(90, 8, requires_grad=True)
    with Largest() as largest:
        tokens_RC = candidates(hidden_RH, torch.arange(90), head, most=16, vocab_size=1000)
        logits_RC = logits_at(tokens_RC, hidden_RH, head.weight)
        selector(logits_RC, tokens_RC, hidden_RH, tokens_RC[:, 0]).logsumexp(-1).sum().backward()
    assert hidden_RH.grad is not None
    assert largest.most <= max(1000 * 8, 90 * 16 * 4, 4000) < 90 * 1000


@pytest.mark.parametrize(
    "bad", [{"selector_top_k": 1}, {"selector_top_k": -1}, {"conv_kernel_size": -1}, {"selector_rank": 0},
            {"conv_group_size": 0}, {"block_size": 1}],
)  # fmt: skip
def test_options_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        DFlash2Options(**bad)
