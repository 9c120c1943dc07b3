"""The component that the package offers: one cache format."""

from deepspec_core.plugins import ComponentSpec, hookimpl


@hookimpl
def deepspec_cache_formats():
    yield ComponentSpec(
        name="npz",
        summary="one NumPy archive a shard, which numpy.load opens",
        build="deepspec_npz_cache.npz:NpzFormat",
    )
