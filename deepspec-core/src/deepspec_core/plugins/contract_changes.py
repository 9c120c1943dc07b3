"""What changed in the contracts from one core to the next, for authors whose plugin was written for an earlier one.

The contracts carry core's version. Knows versions and requirements. Does not know the contracts themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.version import Version

_FIRST: Final = "0.1"
# By the version that brought them, oldest first. CHANGELOG.md tells them at length.
CHANGES: Final[Mapping[str, tuple[str, ...]]] = {
    "0.2": (
        "readers of caches have tokens_of(index)",
        "FamilyAdapter, layouts and TransformersTarget are in deepspec_core.families",
        'head_norms=True is norms="each head"',
        "TargetStep has last_hidden",
        "targets get sees and kept with trees",
        "what was in deepspec_dflash.anchors is in deepspec_core.preparation",
        "wrappers of proposers hand on reads_last_hidden and max_nodes",
        "registry.trained_drafts() lists draft types that are trained",
        "importers are gone: nothing called them",
        "a draft's own soft cap is architecture.draft_softcap, and Heads has target_softcap",
    ),
}


def changed_since(accepted: SpecifierSet, installed: str) -> tuple[str, ...]:
    """What changed after the newest contracts that a plugin accepts, up to the installed core's.

    A plugin accepts contracts where it accepts a core that has them: of 0.1 these are all before 0.2. It is enough to
    ask for the first one, and for those that the requirement names, with their neighbours.
    """
    named = [Version(part.version.removesuffix(".*")) for part in accepted]
    near = [one for version in named for one in (version, _next(version))]
    ours = Version(installed)
    asked = [one for one in (*map(Version, (_FIRST, *CHANGES)), *near) if one < ours and accepted.contains(one)]
    if not asked:
        return ()
    newest = max(asked)
    return tuple(change for version, said in CHANGES.items() if newest < Version(version) <= ours for change in said)


def _next(version: Version) -> Version:
    return Version(f"{version.major}.{version.minor}.{version.micro + 1}")
