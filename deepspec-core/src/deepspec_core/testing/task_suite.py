"""TaskSuite: the clauses of an evaluation task: it yields prompts that core can ask, and the same ones every time.

This file knows what a task yields and how core reads it. It does not know where its rows come from: the subclass
provides rows for a task that fetches them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt, load_task, prompt_of
from deepspec_core.plugins.references import resolve
from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.global_draws import no_global_draws

_TASK = "deepspec_core/plugins/specs.py: TaskSpec"
_SPOKEN = ("messages", "turns", "conversations")


class TaskSuite(Suite):
    """Clauses of `plugins.TaskSpec`.

    rows: Rows of the task's own data, for `from_row`. Without rows, the clauses of `from_row` are not tested.
    """

    kind = "task"
    rows: ClassVar[Sequence[Mapping[str, Any]]] = ()

    def offline(self) -> AbstractContextManager[Any]:
        """A context in which the task finds its data. A task that fetches rows overrides it to replace the network."""
        return nullcontext()

    def built(self, limit: int | None, seed: int) -> list[Any]:
        """The rows that the task yields."""
        with self.offline():
            return list(self.registry().load("task", self.component)(limit, seed))

    def prompts(self, limit: int | None = None, seed: int = 0) -> list[Prompt]:
        """The prompts that core makes of the task's rows."""
        with self.offline():
            return load_task(
                self.component, limit=limit, seed=seed, base=Path(), registry=self.registry(), held_out=list
            )

    @clause("`build(limit, seed)` yields mappings with `messages` or `turns`, of plain JSON types", written=_TASK)
    def test_rows_are_conversations(self) -> None:
        rows = self.built(None, 0)
        require(rows, "no rows")
        for number, row in enumerate(rows):
            require(isinstance(row, Mapping), f"row {number} is a {type(row).__name__}")
            require(any(name in row for name in _SPOKEN), f"row {number} has {sorted(row)}")
            json.dumps(dict(row))

    @clause("every row begins with a user's question that says something", written=_TASK)
    def test_prompts_can_be_asked(self) -> None:
        for prompt in self.prompts():
            asked = prompt.messages[-1]["content"]
            require(str(asked).strip(), f"prompt {prompt.id!r} asks {asked!r}")

    @clause("ids tell rows apart", written=_TASK)
    def test_ids_differ(self) -> None:
        given = [row["id"] for row in self.built(None, 0) if "id" in row]
        twice = sorted({str(one) for one in given if given.count(one) > 1})
        require(not twice, f"ids of several rows: {twice}")

    @clause("a limit cuts the prompts, to at least one and at most so many", written=_TASK)
    def test_a_limit_cuts(self) -> None:
        count = len(self.prompts())
        for limit in (1, 2, count):
            found = len(self.prompts(limit))
            require(found == min(limit, count), f"{found} prompts of {count}, with a limit of {limit}")

    @clause("the same seed asks the same; nothing is drawn from global random numbers", written=_TASK)
    def test_the_same_seed_asks_the_same(self) -> None:
        with no_global_draws():
            first, again = self.prompts(2, seed=3), self.prompts(2, seed=3)
        require(first == again, f"{[one.id for one in first]}, then {[one.id for one in again]}")

    @clause("an id stands for one question, whatever the limit and the seed", written=_TASK)
    def test_an_id_is_one_question(self) -> None:
        known = {str(row["id"]): row for row in self.built(None, 0) if "id" in row}
        for limit, seed in ((2, 0), (None, 1)):
            for row in self.built(limit, seed):
                if "id" in row:
                    words = f"id {row['id']!r} with limit {limit} and seed {seed}"
                    require(str(row["id"]) in known, f"{words} is of no row with limit None and seed 0")
                    require(known[str(row["id"])] == row, f"{words} is another question")

    @clause(
        "`from_row` makes of a row of the task's data a question that core can ask, the same each time, with its own "
        "id, and refuses another row with a DataError",
        written=_TASK,
    )
    def test_rows_of_a_file(self) -> None:
        spec: Any = self.registry().get("task", self.component)
        name = spec.from_row
        if name is None:
            return
        from_row = resolve(name)
        given = deepcopy(list(self.rows))
        with no_global_draws():
            first, again = ([from_row(row) for row in given] for _ in range(2))
        require(given == list(self.rows), "from_row writes into the row that it is given")
        ids = []
        for index, (made, same) in enumerate(zip(first, again, strict=True)):
            require(isinstance(made, Mapping) and any(made.get(one) for one in _SPOKEN), f"from_row gives {made!r}")
            require(made == same, f"from_row gives {made!r}, and of the same row again {same!r}")
            try:
                ids.append(prompt_of(made, index, self.component, f"row {index + 1}").id)
            except DataError as error:
                require(False, f"from_row gives {made!r}. {error.problem}: {error.found}")
        twice = sorted({one for one in ids if ids.count(one) > 1})
        require(not twice, f"from_row gives one id to several rows: {twice}")
        try:
            made = from_row({"of another data set": 1})
        except DataError:
            return
        require(False, f"from_row makes {made!r} of a row without its columns")
