"""A draft that reads the target's last hidden state while decoding, and no tapped layer: it sees there what it saw in
training, and everything that holds of any draft holds of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_every_pair as every_pair
import torch
from last_hidden_draft import PLUGIN, LastHiddenDraft, LastHiddenOptions, LastHiddenProposer
from plugin_on_path import install

from deepspec_core.cli.main import main
from deepspec_core.contracts.proposer import features_for
from deepspec_core.contracts.target import TargetStep
from deepspec_core.decoding.calibrated import CalibratedProposer
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.table_proposer import TableProposer


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """The installed plugins, and one with this draft, which no other test file sees."""
    with pytest.MonkeyPatch.context() as patch:
        install(tmp_path_factory.mktemp("site"), patch, "fake-last-hidden", PLUGIN)
        return load_plugins().registry


@pytest.fixture(scope="module", params=["qwen3", "gemma4"])
def pair(request: pytest.FixtureRequest, tiny_target: Callable[..., Any], registry: Registry) -> every_pair.Pair:
    """The draft after a few steps on a target, one family with soft-capped logits, windows and a scaled embedding."""
    target = tiny_target(request.param)
    torch.manual_seed(1)
    draft = LastHiddenDraft(LastHiddenOptions(), target.adapter, ())
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    plain = every_pair.decoded(target, None)
    losses = every_pair.train(draft, target, list(plain.values()), registry)
    return every_pair.Pair(target=target, draft=draft.eval(), losses=losses, plain=plain)


test_it_learns = every_pair.test_training_lowers_the_loss_and_leaves_the_targets_weights_alone
test_it_decodes_losslessly = every_pair.test_greedy_speculative_output_is_plain_greedy_output
test_its_checkpoint_proposes_the_same = every_pair.test_a_checkpoint_proposes_the_same
test_its_proposals_do_not_depend_on_neighbours = every_pair.test_proposals_do_not_depend_on_what_else_is_in_the_batch


def test_decoding_sees_the_features_of_training(pair: every_pair.Pair) -> None:
    """Prompts of unequal lengths, in batches with refilled slots, through a wrapper; and each alone."""
    wrapped = LastHiddenProposer(pair.draft)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(slots: torch.Tensor, prompt: torch.Tensor, *rest: Any) -> None:
        for slot, ids in zip(slots.tolist(), prompt.tolist(), strict=True):
            (request,) = (one for one in every_pair.requests() if tuple(ids[: len(one.prompt_ids)]) == one.prompt_ids)
            seen[request.id] = wrapped.seen[slot]

    start = wrapped.start
    wrapped.start = lambda *given: (start(*given), keep(*given))  # type: ignore[method-assign, assignment, func-returns-value]
    together = every_pair.decoded(pair.target, CalibratedProposer(wrapped, [1.0] * wrapped.max_tokens))
    assert seen.keys() == together.keys()
    for name, done in together.items():
        given_TH = torch.cat(seen[name])
        ids_1T = torch.tensor([[*done.prompt_ids, *done.output_ids]])[:, : len(given_TH)]
        trained = pair.target.model.features(ids_1T, torch.ones_like(ids_1T), None, None, ())
        assert trained.hidden.shape == (1, len(given_TH), 0)
        torch.testing.assert_close(given_TH, trained.last_hidden[0], rtol=1e-4, atol=1e-5)


def test_who_does_not_ask_gets_the_taps_as_they_are(pair: every_pair.Pair) -> None:
    step = TargetStep(logits=torch.ones(1, 2, 3), hidden=torch.ones(1, 2, 8), last_hidden=torch.zeros(1, 2, 4))
    asking = LastHiddenProposer(pair.draft)
    assert features_for(TableProposer(vocab_size=3, max_tokens=1), step) is step.hidden
    assert torch.equal(features_for(asking, step), torch.cat([step.hidden, step.last_hidden], dim=-1))


def test_a_run_without_tapped_layers(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checked by a dry run, which builds and tries the draft and the cache; other drafts need taps."""
    install(tmp_path / "site", monkeypatch, "fake-last-hidden", PLUGIN)
    text = run_file.read_text()
    head, _, draft = text.partition("[draft]")
    _, _, rest = draft.partition("\n[")
    run_file.write_text(f'{head}[draft]\ntype = "last-hidden"\n\n[{rest}')
    arguments = ["run", str(run_file), "--smoke", "--dry-run", "--set", "loss.terms={ce=1.0}"]
    assert main([*arguments, "--set", "target.layers=[]"]) == 0, capsys.readouterr().err
    run_file.write_text(text)
    assert main(["init", "builtin:tiny-qwen3", "--draft", "last-hidden", "--output", str(tmp_path / "new.toml")]) == 0
    assert re.search(r"^layers = \[\]", (tmp_path / "new.toml").read_text(), re.MULTILINE)
    capsys.readouterr()
    assert main([*arguments, "--set", "target.layers=[]"]) == 2
    assert "drafts of this type need tapped layers" in capsys.readouterr().err
