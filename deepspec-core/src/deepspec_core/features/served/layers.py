"""The numbers by which engines know hidden states: layer L's output is L + 1, the embedding 0, the final state the
last.

Knows numbers only.

Legend: K states of a token, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen


@frozen
class AskedLayers:
    """The taps of a draft and the final state, as engines number and order them.

    taps: Decoder layers from 0, -1 for the embedding, in whichever order features are to have them.
    num_layers: Decoder layers of the target, which is also the number of its final state.
    """

    taps: tuple[int, ...]
    num_layers: int

    @property
    def ids(self) -> tuple[int, ...]:
        """The engine's numbers of the requested states, increasing. There are K."""
        return tuple(sorted({*(tap + 1 for tap in self.taps), self.num_layers}))

    @property
    def columns(self) -> tuple[int, ...]:
        """Where each tap stands among the K, in the order of `taps`."""
        places = {number: column for column, number in enumerate(self.ids)}
        return tuple(places[tap + 1] for tap in self.taps)

    def name(self, column: int) -> str:
        """How messages call a state."""
        number = self.ids[column]
        if number == self.num_layers:
            return "the final state"
        return "the embedding" if number == 0 else f"layer {number - 1}"


def consecutive(columns: Sequence[int]) -> bool:
    """Whether columns stand one after another, from the first on, so that nothing has to be moved."""
    return list(columns) == list(range(len(columns)))
