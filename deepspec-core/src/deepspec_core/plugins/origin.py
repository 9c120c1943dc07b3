"""Where an object comes from: the distribution that installed its class, in the words of messages.

Knows installed distributions. Does not know hooks, kinds or names of components. It is asked only where something went
wrong, because looking through all distributions takes time.
"""

from __future__ import annotations

from importlib.metadata import packages_distributions, version


def package_of(thing: object) -> str:
    """ "deepspec-toy 1.0" for an object whose class deepspec-toy brought; the top package where no distribution did."""
    return distribution_of(type(thing).__module__)


def distribution_of(module: str) -> str:
    """The same for a module's name."""
    top = module.partition(".")[0]
    owners = packages_distributions().get(top)
    if not owners:
        # An editable installation does not always list its packages.
        owners = [top.replace("_", "-")]
    try:
        return f"{owners[0]} {version(owners[0])}"
    except ModuleNotFoundError:
        return top


def component_of(thing: object) -> str:
    """ "ToyProposer (toy.proposer)" for an object of that class."""
    return f"{type(thing).__qualname__} ({type(thing).__module__})"
