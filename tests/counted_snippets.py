"""The Python blocks of a page, run one after another, and which of the functions they define were called since.

Knows Python. Does not know what the snippets are about, nor who calls them.
"""

import __future__

import ast
import importlib
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from attrs import evolve
from safetensors.torch import save_file
from torch import Tensor, nn

from deepspec_core.plugins.promised import promised_names
from deepspec_core.plugins.public import PUBLIC_MODULES

# What snippets take for imported, beside public names.
COMMON = {
    "Mapping": Mapping, "Path": Path, "Tensor": Tensor, "evolve": evolve, "json": json, "nn": nn, "np": np,
    "prod": math.prod, "save_file": save_file, "suppress": suppress, "torch": torch,
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of a language, in order."""
    return [textwrap.dedent(code) for code in re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)]


def public_names(*packages: str) -> dict[str, Any]:
    """Every public name of core and of these packages."""
    names: dict[str, Any] = {}
    for module in (*PUBLIC_MODULES, *(module for package in packages for module in promised_names(package))):
        found = importlib.import_module(module)
        names |= {name: getattr(found, name) for name in getattr(found, "__all__", ()) if hasattr(found, name)}
    return names


class Snippets:
    """Blocks that were run, one after another, as one module. `names` is what they defined."""

    def __init__(self, codes: Sequence[str], imported: Mapping[str, Any]) -> None:
        self.called: set[str] = set()
        self.module = ModuleType("snippets")
        self.names = vars(self.module)
        self.names |= {**imported, "_called": self.called}
        self.functions: list[list[str]] = []
        for code in codes:
            counting = _Counting(len(self.functions))
            tree = ast.fix_missing_locations(counting.visit(ast.parse(code)))
            self.functions.append(counting.functions)
            exec(
                compile(tree, f"block {len(self.functions)}", "exec", flags=__future__.annotations.compiler_flag),
                self.names,
            )

    def never_called(self, block: int) -> list[str]:
        """The functions, methods and lambdas of a block that nothing has called, by their places in it."""
        return [name.partition(": ")[2] for name in self.functions[block] if name not in self.called]


class _Counting(ast.NodeTransformer):
    """Makes each function say that it was called, before it does anything else."""

    def __init__(self, block: int) -> None:
        self.functions: list[str] = []
        self._block, self._within = block, list[str]()

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._inside(node, node.name)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        told = ast.Expr(self._told(node.name))
        self._inside(node, node.name)
        node.body.insert(0 if ast.get_docstring(node) is None else 1, told)
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        told = self._told(f"lambda in line {node.lineno}")
        self.generic_visit(node)
        node.body = ast.Subscript(ast.Tuple([told, node.body], ast.Load()), ast.Constant(1), ast.Load())
        return node

    def _inside(self, node: ast.AST, name: str) -> ast.AST:
        self._within.append(name)
        self.generic_visit(node)
        self._within.pop()
        return node

    def _told(self, name: str) -> ast.expr:
        self.functions.append(f"{self._block}: {'.'.join([*self._within, name])}")
        return ast.parse(f"_called.add({self.functions[-1]!r})", mode="eval").body
