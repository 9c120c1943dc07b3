"""Targets and drafts for the Python interface: opened by name and checked against each other.

Knows how names become loaded models, and which draft fits which target; does not know what is done with them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen

from deepspec_core.checkpoints import published
from deepspec_core.checkpoints.opening import check_same_target, draft_adapter, resolve_draft
from deepspec_core.config.schema import DTYPES, TreeOptions
from deepspec_core.config.trees import require_trees
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture, TargetModel
from deepspec_core.contracts.untrained import UntrainedDescription, UntrainedDraft
from deepspec_core.data.template_check import check_template
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.dtypes import dtype_name, torch_dtype
from deepspec_core.errors import CheckpointError, ConfigError, nearest
from deepspec_core.interface.arguments import flag_of, name_of, path_of
from deepspec_core.interface.options import checked
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.plugins.exits import no_exit
from deepspec_core.targets.chat_template import read_chat_template
from deepspec_core.targets.opening import load_target as load_weights
from deepspec_core.targets.opening import open_target_alone, resolve_model, tokenizer_for
from deepspec_core.untrained.making import make_untrained, proposer_of
from deepspec_core.untrained.named import untrained_of

log = logging.getLogger("deepspec")


@frozen(kw_only=True, eq=False)
class Target:
    """A loaded target. `name` and `revision` are those given to `load_target`; `tokenizer` is from transformers."""

    name: str
    adapter: TargetAdapter
    model: TargetModel
    tokenizer: Any = field(repr=False)
    plugins: Plugins = field(repr=False)
    revision: str | None = None

    @property
    def architecture(self) -> TargetArchitecture:
        """Sizes and special tokens."""
        return self.adapter.architecture

    def chat(self, *, thinking: bool) -> ChatTokenizer:
        """The tokenizer with its chat template. DataError if it has none, or one that does not fit the family."""
        chat = ChatTokenizer(self.tokenizer, thinking=thinking, stop_ids=self.architecture.stop_token_ids)
        check_template(chat, self.adapter.conversation_format(), where=self.name)
        return chat

    def __repr__(self) -> str:
        a = self.architecture
        sizes = f"{a.num_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size:,}"
        return f"<Target {self.name}: {a.model_type}, {sizes}, {dtype_name(self.model.dtype)} on {self.model.device}>"


@frozen(kw_only=True, eq=False)
class Draft:
    """A loaded draft.

    path: The draft's directory, or its name if it is not trained.
    description: Facts about the draft.
    target: The target that the draft was opened for, in `dtype` and on `device`.
    tree_nodes: The number of tokens in the trees that the draft proposes; None: it proposes chains.
    """

    path: Path | str
    model: DraftModel | UntrainedDraft = field(repr=False)
    description: DraftDescription | UntrainedDescription
    target: TargetArchitecture = field(repr=False)
    dtype: torch.dtype = field(repr=False)
    device: torch.device = field(repr=False)
    tree_nodes: int | None = None

    def proposer(self) -> Proposer:
        """A new proposer."""
        if self.tree_nodes is None:
            return self.model.proposer()
        assert isinstance(self.model, DraftModel), "only trained drafts propose trees"
        return self.model.tree_proposer(self.tree_nodes)

    def __repr__(self) -> str:
        said = self.description
        tree = "" if self.tree_nodes is None else f" of a tree of {self.tree_nodes}"
        return (
            f"<Draft {self.path}: {said.algorithm}, {said.num_layers} layers, {said.max_tokens} tokens a round{tree}>"
        )


@no_exit()
def load_target(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    chat_template: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """The target of a directory, a Hub id or `builtin:NAME`, with its weights and its tokenizer.

    `dtype` is "float32", "bfloat16" or "float16"; left out, it is float32 on a CPU, where results are exact, and
    bfloat16 elsewhere. `device` is PyTorch's name of a device; left out, the accelerator if there is one. `revision` is
    a branch, tag or commit on the Hub. `chat_template` is a Jinja file to use in place of the target's own template.
    Raises DeepSpecError if there is no such target, if no plugin covers it, or if the template file cannot be read or
    does not fit the target.
    """
    trust_remote_code = flag_of(trust_remote_code, "trust_remote_code")
    plugins = load_plugins()
    name = name_of(name, "name", expected="a directory, a Hub id or builtin:NAME")
    place = _device(device)
    numbers = _dtype(dtype, place)
    where = resolve_model(name, base=Path.cwd(), registry=plugins.registry, revision=revision)
    adapter, _ = open_target_alone(
        where, registry=plugins.registry, trust_remote_code=trust_remote_code, revision=revision
    )
    # The tokenizer comes first, so that a missing one is reported before gigabytes of weights are read.
    tokenizer = tokenizer_for(where, trust_remote_code, revision=revision)
    if chat_template is not None:
        path = path_of(chat_template, "chat_template", expected="a Jinja file")
        tokenizer.chat_template = read_chat_template(path)
        check_template(ChatTokenizer(tokenizer), adapter.conversation_format(), where=path)
    model = load_weights(
        adapter, where, dtype=numbers, device=place, trust_remote_code=trust_remote_code, revision=revision
    )
    return Target(name=name, adapter=adapter, model=model, tokenizer=tokenizer, plugins=plugins, revision=revision)


@no_exit()
def load_draft(name: str | Path, target: Target, *, tree_nodes: int | None = None) -> Draft:
    """The draft of a directory or a Hub id, in the target's dtype and on its device.

    A draft that is not trained is given as its type and options: "TYPE"; "TYPE:VALUE", with the value of its one
    required option; or "TYPE:key=value,key=value". If a directory has that name, the directory is opened. With
    `tree_nodes` the draft proposes trees of at most this many tokens in place of chains. Trees carry no confidence.

    Raises DeepSpecError if there is no such checkpoint, if no installed algorithm recognises it, if its weights are
    damaged, if it was made for a target of other sizes, or if it proposes no trees. This function cannot check whether
    the draft was trained for exactly this target: a draft of another target of the same sizes is opened, and few of its
    tokens are accepted.
    """
    check_models(target, None)
    registry = target.plugins.registry
    name = name_of(name, "name", expected="a directory, a Hub id, or a draft type that is not trained")
    here, numbers, device = Path.cwd(), target.model.dtype, target.model.device
    untrained = untrained_of(name, base=here, registry=registry)
    if untrained is not None:
        made = make_untrained(
            untrained.type,
            untrained.options,
            architecture=target.architecture,
            tokenizer=target.tokenizer,
            dtype=numbers,
            device=device,
            base=here,
            registry=registry,
        )
        for remark in made.describe().remarks:
            log.warning("%s: %s", name, remark)
        proposer_of(untrained.type, made, registry)  # reads the weights
        return Draft(
            path=name, model=made, description=made.describe(), target=target.architecture, dtype=numbers, device=device
        )
    folder = resolve_draft(name, base=here)
    adapter = draft_adapter(folder, registry=registry)
    check_same_target(folder, adapter.architecture, target.architecture)
    if tree_nodes is not None:
        checked(TreeOptions, {"nodes": tree_nodes}, call="load_draft", registry=registry)
        require_trees(published.read_options(folder, registry)[0], registry, where="tree_nodes")
    model = published.load_draft(folder, registry=registry, adapter=adapter, dtype=numbers, device=device)
    said = model.describe()
    if tree_nodes is not None:
        said = evolve(said, gives_confidence=False)
    return Draft(
        path=folder,
        model=model,
        description=said,
        target=target.architecture,
        dtype=numbers,
        device=device,
        tree_nodes=tree_nodes,
    )


def check_models(target: Target, draft: Draft | None) -> None:
    """ConfigError for an argument that is not a loaded model; CheckpointError for a draft that was opened for a target
    of other sizes, dtype or device."""
    if not isinstance(target, Target):
        raise _no_model("target", target, "load_target(NAME)")
    if draft is None:
        return
    if not isinstance(draft, Draft):
        raise _no_model("draft", draft, "load_draft(NAME, target), or None")
    opened = _facts(draft.target, draft.dtype, draft.device)
    wanted = _facts(target.architecture, target.model.dtype, target.model.device)
    if opened != wanted:
        different = [name for name in wanted if opened[name] != wanted[name]]
        raise CheckpointError(
            "the draft was opened for another target: " + ", ".join(f"`{name}` differs" for name in different),
            where=draft.path,
            found=", ".join(f"{name} = {opened[name]}" for name in different),
            expected=", ".join(f"{name} = {wanted[name]}" for name in different),
            fix="Open it again with load_draft(NAME, target).",
        )


def _no_model(argument: str, given: object, source: str) -> ConfigError:
    return ConfigError(
        f"this is not a loaded {argument}",
        where=f"the argument `{argument}`",
        found=repr(given),
        expected=f"the result of {source}",
    )


def _facts(architecture: TargetArchitecture, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The facts in which a draft and its target must agree."""
    return {
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "num_layers": architecture.num_layers,
        "dtype": dtype_name(dtype),
        "device": str(device),
    }


def _dtype(given: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if given is None:
        given = "float32" if device.type == "cpu" else "bfloat16"
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        close = nearest(name, DTYPES)
        raise ConfigError(
            "a target cannot be loaded in this dtype",
            where="dtype",
            found=name,
            expected=f"one of {', '.join(DTYPES)}",
            fix=f"write {close!r}" if close else None,
        )
    return torch_dtype(name)


def _device(given: str | torch.device | None) -> torch.device:
    if given is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(given)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    # A device that is unknown, not built in, or not there: PyTorch raises another type for each.
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            "no such device",
            where="device",
            found=f"{given} ({(str(error).splitlines() or [''])[0]})",
            expected="the name of a device, such as cpu, cuda or cuda:1",
        ) from error
    return device
