"""TargetAdapterSuite: the clauses of target families: features, decoding in slots, loading, and the modules of drafts.

A tiny model with random weights is compared with transformers' own forward pass. This file knows the contract of
targets and transformers' conventions. The subclass decides which family is tested. Clauses about the modules that
drafts are made of are in draft_blocks_suite.py, and those about a target's state in target_state_suite.py.

Legend: B sequences or slots, T tokens, H hidden size, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from unittest import SkipTest

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepspec_core.contracts.target import ConversationFormat, TargetAdapter, TargetModel
from deepspec_core.data.template_check import check_template
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import TargetError
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.draft_blocks_suite import tokens
from deepspec_core.testing.target_runs import TAPS, alone, step
from deepspec_core.testing.target_state_suite import TargetStateSuite
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer

_MODEL = "deepspec_core/contracts/target.py: TargetModel"
_ADAPTER = "deepspec_core/contracts/target.py: TargetAdapter"
_FEATURES = "deepspec_core/contracts/target.py: TargetFeatures"
_FORMAT = "deepspec_core/contracts/target.py: ConversationFormat"


class TargetAdapterSuite(TargetStateSuite):
    """Clauses of `contracts.target.TargetAdapter` and of the `TargetModel` that it loads.

    template: The chat template of the family's models, in Jinja, or one that writes turns in the same way. None: the
        suite does not test whether answers are found in rendered texts.
    """

    template: ClassVar[str | None] = None

    @clause(
        "the adapter has the members of the contract, supports its own targets and knows their numbers",
        written=_ADAPTER,
    )
    def test_it_is_an_adapter(self) -> None:
        adapter, text = self.adapter(), self.config().get_text_config()
        require(isinstance(adapter, TargetAdapter), f"{type(adapter).__name__}, in which members are missing")
        require(adapter.unsupported() is None, f"unsupported(): {adapter.unsupported()}")
        found = adapter.architecture
        for name, right in (
            ("hidden_size", text.hidden_size), ("vocab_size", text.vocab_size), ("num_layers", text.num_hidden_layers),
            ("model_type", self.config().model_type),
        ):  # fmt: skip
            require(
                getattr(found, name) == right,
                f"architecture.{name} = {getattr(found, name)!r}, the config says {right!r}",
            )
        require(bool(adapter.class_prefix), f"class_prefix = {adapter.class_prefix!r}")

    @clause("an answer begins after `assistant_start` and ends with one of `assistant_ends`", written=_FORMAT)
    def test_answers_can_be_found(self) -> None:
        found = self.adapter().conversation_format()
        require(isinstance(found, ConversationFormat), type(found).__name__)
        require(bool(found.assistant_start), "an empty assistant_start")
        ends = found.assistant_ends
        require(isinstance(ends, tuple) and bool(ends) and all(ends), f"assistant_ends = {ends!r}")

    @clause("the family's chat template writes answers where `conversation_format` says", written=_FORMAT)
    def test_the_template_has_such_answers(self) -> None:
        if self.template is None:
            raise SkipTest("the suite's subclass says no `template`")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = self.template
        check_template(ChatTokenizer(tokenizer), self.adapter().conversation_format(), where="template")

    @clause(
        "`hidden` is the tapped layers' outputs in increasing order, `last_hidden` the final norm's", written=_FEATURES
    )
    def test_features_are_the_models_hidden_states(self) -> None:
        model = self.model()
        target = self.target(model)
        require(isinstance(target, TargetModel), f"{type(target).__name__}, in which members are missing")
        ids_T = tokens(11, seed=1)
        hidden_TC, last_TH, logits_TV = alone(model, ids_T)
        found = target.features(ids_T[None], torch.ones(1, 11), None, None, TAPS)
        size = last_TH.shape[1]
        require(found.hidden.shape == (1, 11, len(TAPS) * size), f"hidden is {list(found.hidden.shape)}")
        for number, tap in enumerate(TAPS):
            part = slice(number * size, (number + 1) * size)
            self.near(
                found.hidden[0, :, part], hidden_TC[:, part], f"tap {tap}, beside hidden_states[{tap + 1}] of the model"
            )
        self.near(found.last_hidden[0], last_TH, "last_hidden")
        self.near(self._logits(target, found.last_hidden[0]), logits_TV, "logits of last_hidden and head_weight()")
        bare = target.features(ids_T[None], torch.ones(1, 11), None, None, ())
        require(bare.hidden.shape == (1, 11, 0), f"without taps, hidden is {list(bare.hidden.shape)}")

    @clause("a row of a padded batch has the features that it has alone", written=_MODEL)
    def test_padding_does_not_leak(self) -> None:
        model = self.model()
        target = self.target(model)
        texts = [tokens(length, seed=length) for length in (14, 9, 2)]
        ids_BT, mask_BT = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)], mask_BT[row, : len(text)] = text, 1
        found = target.features(ids_BT, mask_BT, None, None, TAPS)
        for row, text in enumerate(texts):
            hidden_TC, last_TH, _ = alone(model, text)
            words = f"a row of {len(text)} tokens, padded to 17"
            self.near(found.hidden[row, : len(text)], hidden_TC, f"{words}: hidden")
            self.near(found.last_hidden[row, : len(text)], last_TH, f"{words}: last_hidden")

    @clause("conversations packed into a row have the features that each has alone", written=_MODEL)
    def test_documents_are_apart(self) -> None:
        if not self.registry().get("target", self.component).takes_packed:
            raise SkipTest("the spec says takes_packed=False")
        model = self.model()
        target = self.target(model)
        ids_BT, mask_BT = torch.zeros(2, 18, dtype=torch.long), torch.zeros(2, 18)
        positions_BT, documents_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, -1)
        places = []
        # Two rows: one with three conversations, one with two and padding.
        for number, (row, start, length) in enumerate(((0, 0, 6), (0, 6, 9), (0, 15, 3), (1, 0, 4), (1, 4, 8))):
            text, part = tokens(length, seed=length), slice(start, start + length)
            ids_BT[row, part], mask_BT[row, part] = text, 1
            positions_BT[row, part], documents_BT[row, part] = torch.arange(length), number
            places.append((row, part, text))
        found = target.features(ids_BT, mask_BT, positions_BT, documents_BT, TAPS)
        for number, (row, part, text) in enumerate(places):
            hidden_TC, last_TH, _ = alone(model, text)
            words = f"document {number} of five in two rows"
            self.near(found.hidden[row, part], hidden_TC, f"{words}: hidden")
            self.near(found.last_hidden[row, part], last_TH, f"{words}: last_hidden")

    @clause(
        "decoding in slots gives what a forward pass over the whole text gives; tokens not committed leave no trace",
        written=_MODEL,
    )
    def test_decoding_is_the_forward_pass(self) -> None:
        model = self.model()
        target = self.target(model)
        texts = {slot: tokens(length, seed=length) for slot, length in ((0, 20), (2, 17), (3, 25))}
        expected = {slot: alone(model, text) for slot, text in texts.items()}
        target.open_slots(4, 40)
        done = dict.fromkeys(texts, 0)
        # Every call feeds two extra tokens, which are not committed.
        for call in ({0: 5, 2: 9, 3: 1}, {0: 1, 2: 1, 3: 1}, {2: 4}, {0: 3, 3: 8}, {3: 6}, {0: 8, 2: 2, 3: 4}):
            rows = {
                slot: torch.cat([texts[slot][done[slot] : done[slot] + count], tokens(2, seed=count)])
                for slot, count in call.items()
            }
            out = step(target, rows, done)
            for row, (slot, count) in enumerate(call.items()):
                part = slice(done[slot], done[slot] + count)
                words = f"slot {slot}, tokens {part.start} to {part.stop}"
                self.near(out.hidden[row, :count], expected[slot][0][part], f"{words}: hidden")
                self.near(out.logits[row, :count], expected[slot][2][part], f"{words}: logits")
                self.near(out.last_hidden[row, :count], expected[slot][1][part], f"{words}: last_hidden")
                done[slot] += count
            target.commit(torch.tensor(list(call)), torch.tensor([done[slot] for slot in call]))

    @clause("`commit` with a smaller length takes tokens back, and with 0 frees the slot", written=_MODEL)
    def test_tokens_are_taken_back(self) -> None:
        model = self.model()
        target = self.target(model)
        wrong, right = tokens(12, seed=1), tokens(15, seed=2)
        target.open_slots(3, 32)
        for slot, begin in ((1, 4), (2, 0)):
            text = torch.cat([right[:begin], wrong])
            step(target, {slot: text}, {slot: 0})
            target.commit(torch.tensor([slot]), torch.tensor([len(text)]))
            target.commit(torch.tensor([slot]), torch.tensor([begin]))
            out = step(target, {slot: right[begin:]}, {slot: begin})
            self.near(out.logits[0], alone(model, right)[2][begin:], f"after 12 tokens were taken back to {begin}")

    @clause("with `last_only` logits are of each row's last token, and features of all", written=_MODEL)
    def test_prefill(self) -> None:
        model = self.model()
        target = self.target(model)
        texts = {0: tokens(9, seed=40), 1: tokens(4, seed=41)}
        target.open_slots(2, 16)
        out = step(target, texts, {0: 0, 1: 0}, last_only=True)
        require(out.logits.shape[:2] == (2, 1), f"logits {list(out.logits.shape)}")
        require(out.hidden.shape[:2] == (2, 9), f"hidden {list(out.hidden.shape)}")
        for row, text in texts.items():
            self.near(out.logits[row, 0], alone(model, text)[2][-1], f"row {row} of {len(text)} tokens")

    @clause("a tree of new tokens gives each path what it gives as a chain, and `kept` commits one", written=_MODEL)
    def test_trees_are_their_paths(self) -> None:
        model = self.model()
        target = self.target(model)
        prompt, more, ids_T = tokens(9, seed=20), tokens(4, seed=22), tokens(6, seed=23)
        parents, kept = (-1, 0, 0, 1, 2, 4), (0, 2, 4, 5)
        sees_TT = torch.zeros(6, 6, dtype=torch.bool)
        for column, parent in enumerate(parents):
            sees_TT[column, column] = True
            if parent >= 0:
                sees_TT[column] |= sees_TT[parent]
        slot_B = torch.tensor([1])
        target.open_slots(3, 64)
        step(target, {1: prompt}, {1: 0})
        target.commit(slot_B, torch.tensor([9]))
        positions_BT = (9 + sees_TT.sum(1) - 1)[None]
        out = target.decode(slot_B, ids_T[None], positions_BT, TAPS, sees=sees_TT[None])
        for column in range(6):
            path = torch.cat([prompt, ids_T[sees_TT[column]]])
            self.near(out.logits[0, column], alone(model, path)[2][-1], f"node {column} of the tree {parents}")
        target.commit(slot_B, torch.tensor([9 + len(kept)]), torch.tensor([kept]))
        text = torch.cat([prompt, ids_T[list(kept)], more])
        again = step(target, {1: more}, {1: 9 + len(kept)})
        self.near(again.logits[0], alone(model, text)[2][9 + len(kept) :], f"after the path {kept} was committed")

    @clause("weights that do not fit the config are a TargetError that names them", written=_ADAPTER)
    def test_missing_weights_are_refused(self) -> None:
        with TemporaryDirectory() as folder:
            self.model().save_pretrained(folder)
            path = Path(folder) / "model.safetensors"
            weights = load_file(path)
            gone = sorted(name for name in weights if ".layers.3." in name and name.endswith("weight"))[0]
            kept = {name: tensor.clone() for name, tensor in weights.items() if name != gone}
            save_file(kept, path, metadata={"format": "pt"})
            try:
                self.adapter().load(folder, dtype=torch.float32, device="cpu")
            except TargetError as error:
                require(gone in str(error), f"without {gone}: {error}")
            else:
                require(False, f"without {gone} the target is loaded all the same")

    @clause("`embedding` gives the inputs of the first layer, with the target's weights", written=_ADAPTER)
    def test_the_embedding_is_the_targets(self) -> None:
        target, adapter = self.target(self.model()), self.adapter()
        embedding = adapter.embedding()
        embedding.weight = nn.Parameter(target.embedding_weight())
        ids_BT = torch.arange(2, 12)[None]
        found = target.features(ids_BT, torch.ones(1, 10), None, None, (-1,)).hidden
        with torch.no_grad():
            self.near(embedding(ids_BT), found, "with the weights of embedding_weight(), beside tap -1")

    def _logits(self, target: TargetModel, last_TH: Tensor) -> Tensor:
        logits_TV, cap = last_TH @ target.head_weight().T, target.architecture.logit_softcap
        return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)
