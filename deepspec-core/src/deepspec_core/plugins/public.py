"""What plugin authors may import from core: the one list. Everything else in core is private and may move or change.

A module of core has `__all__` exactly if it is on this list, and its public names are those in `__all__`. This file
names modules as text and imports none of them. Packages of plugins have no list: `__all__` is enough (promised.py).
"""

from __future__ import annotations

import ast
import importlib
import inspect
from itertools import pairwise
from pathlib import Path

from attrs import frozen

from deepspec_core.plugins.promised import promised_names

_CORE = Path(__file__).parents[1]

# Module -> what it is for, in the order of the documentation.
PUBLIC_MODULES = {
    "deepspec_core": "The Python interface for notebooks and scripts.",
    "deepspec_core.plugins": "What a plugin's plugin.py is written with: the hook marker and specs.",
    "deepspec_core.plugins.discovery": "Loading the installed plugins, for scripts and tests.",
    "deepspec_core.plugins.registry": "The installed components, by kind and name.",
    "deepspec_core.errors": "Errors that users see.",
    "deepspec_core.config.bounds": "Validators of numbers in options.",
    "deepspec_core.contracts.draft": "What an algorithm provides.",
    "deepspec_core.contracts.untrained": "What an algorithm provides whose drafts are not trained.",
    "deepspec_core.contracts.rows": "What drafts hand to losses.",
    "deepspec_core.contracts.proposer": "The decoding side of an algorithm.",
    "deepspec_core.contracts.loss": "Loss terms and weightings.",
    "deepspec_core.contracts.target": "What a target family provides.",
    "deepspec_core.contracts.cache": "Feature cache formats.",
    "deepspec_core.contracts.features": "Feature sources.",
    "deepspec_core.contracts.export": "Exports.",
    "deepspec_core.data.hub_rows": "For tasks: rows of a dataset on the Hub.",
    "deepspec_core.families.adapter": "The base of target families' adapters.",
    "deepspec_core.families.layouts": "Layouts of attention, norms and rotary embedding that families share.",
    "deepspec_core.families.vocabulary": "A target's embedding and lm_head without the rest of it.",
    "deepspec_core.families.styled": "A draft whose layers are another family's than its target's.",
    "deepspec_core.families.transformers_target": "Any transformers causal language model as a target.",
    "deepspec_core.families.loading": "Loading such a model from a directory, strictly.",
    "deepspec_core.layers.attention": "A draft layer's attention without its pattern.",
    "deepspec_core.layers.decoder_layer": "A draft layer in its family's layout.",
    "deepspec_core.layers.draft_vocabulary": "A draft's reduced vocabulary.",
    "deepspec_core.layers.interval_mask": "Flex attention's mask of queries that see an interval of keys.",
    "deepspec_core.layers.score_chunks": "How attention cuts its queries into chunks, and the keys of a chunk.",
    "deepspec_core.layers.recomputing": "Layers that compute their activations again in backward.",
    "deepspec_core.layers.softcap": "Soft-capped logits.",
    "deepspec_core.layers.window": "How many positions a draft's layers see.",
    "deepspec_core.layers.options": "The draft's own shape, as a run file gives it.",
    "deepspec_core.preparation.anchors": "Blocks at drawn anchors, and their rows.",
    "deepspec_core.preparation.positions": "The distinct target positions of a batch.",
    "deepspec_core.decoding.kv_cache": "A draft's keys and values, by slots.",
    "deepspec_core.decoding.best_first": "The best tree of a draft's distributions.",
    "deepspec_core.decoding.sampling": "Distributions and draws, as the engine makes them.",
    "deepspec_core.cache.sharded": "A cache format made of shards: writing, sealing, resuming, checking.",
    "deepspec_core.cache.shard_layout": "What is inside a shard: the part that such formats differ in.",
    "deepspec_core.cache.shard_arrays": "A sample as named arrays.",
    "deepspec_core.cache.manifest": "The sealed shards of a cache.",
    "deepspec_core.cache.manifest_digest": "The digest of a cache's manifest, and sealing one that was edited.",
    "deepspec_core.checkpoints.published": "Draft checkpoints: writing, reading, published names of weights.",
    "deepspec_core.checkpoints.draft_window": "How a draft's config.json says its window.",
    "deepspec_core.targets.taps": "Which decoder layers may be tapped.",
    "deepspec_core.testing": "For tests: a suite for each contract. A plugin's first test is a subclass of one.",
    "deepspec_core.testing.draft_checks": "For tests: what must hold of any draft.",
    "deepspec_core.testing.driven_proposer": "For tests: a proposer driven by hand.",
    "deepspec_core.testing.public_imports": "For tests: what a plugin imports of core.",
    "deepspec_core.testing.random_batches": "For tests: random samples and batches.",
    "deepspec_core.testing.recorded": "For tests: recorded cases, loaded and replayed.",
    "deepspec_core.testing.shifted": "For tests: weights at other addresses.",
    "deepspec_core.testing.core_registry": "For tests: core's own loss terms and weightings.",
    "deepspec_core.testing.table_proposer": "For tests: a proposer that reads its tokens from a table.",
    "deepspec_core.testing.table_trees": "For tests: a proposer of trees from a table.",
    "deepspec_core.testing.tiny_draft": "For tests: a small draft.",
    "deepspec_core.testing.tiny_family": "For tests: a small family, whose blocks drafts are built from.",
    "deepspec_core.testing.tiny_target": "For tests: a small target.",
    "deepspec_core.testing.tiny_tokenizer": "For tests: a small tokenizer with a chat template.",
}


@frozen(kw_only=True)
class PublicName:
    """A name of a public module, and the first sentence of its docstring."""

    name: str
    about: str


def public_names(module: str) -> list[PublicName]:
    """The names of a public module. The module is imported for it."""
    loaded = importlib.import_module(module)
    return [PublicName(name=name, about=first_sentence(_docstring(module, name))) for name in loaded.__all__]


def markdown(*packages: str) -> str:
    """The list as a page, with what these packages of plugins promise."""
    lines = [
        "# What plugins may import",
        "",
        "This is the whole list. Everything else in `deepspec_core` is private: it may move or change in any release.",
        "So is everything else in the packages of the plugins below, at the end.",
        "",
        "The source says the same. A module is public if it has `__all__`; its public names are those in `__all__`.",
        "A module without `__all__` is private. A name is private if it is not in its module's `__all__`.",
        f"These folders are private as a whole: {', '.join(f'`{name}/`' for name in _private_folders())}.",
        "",
        "A package that a plugin is in promises names in the same way. A package without `__all__` promises none.",
        "",
        "`deepspec_core.testing.public_imports` has the test that a plugin takes public names only, of all of these.",
        "The hooks that a plugin implements are in [writing a plugin](plugins.md).",
    ]
    promised = [module for package in packages for module in promised_names(package)]
    for module, about in (PUBLIC_MODULES | {one: _about(one) for one in promised}).items():
        lines += ["", f"## {module}", "", about, "", "| name | what it is |", "|---|---|"]
        for one in public_names(module):
            about = one.about.replace("|", "\\|")
            lines.append(f"| `{one.name}` | {about} |")
    return "\n".join(lines) + "\n"


def _about(module: str) -> str:
    return first_sentence(importlib.import_module(module).__doc__ or "")


def _private_folders() -> list[str]:
    """Core's folders that have no public module."""
    public = {module.split(".")[1] for module in PUBLIC_MODULES if "." in module}
    return sorted({path.parent.name for path in _CORE.glob("*/__init__.py")} - public)


def _docstring(module: str, name: str) -> str:
    """The docstring of a name. That of a constant is the text below its assignment, in the module that assigns it."""
    loaded = importlib.import_module(module)
    value = getattr(loaded, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return inspect.getdoc(value) or ""
    statements = ast.parse(inspect.getsource(loaded)).body
    for statement, below in pairwise(statements):
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            return _docstring(statement.module or "", name)
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            text = below.value if isinstance(below, ast.Expr) else None
            return str(text.value) if isinstance(text, ast.Constant) else ""
    return ""


def first_sentence(docstring: str) -> str:
    """What a list says of a name."""
    text = " ".join(docstring.strip().split("\n\n")[0].split())
    head, stop, _ = text.partition(". ")
    return head + "." if stop else text
