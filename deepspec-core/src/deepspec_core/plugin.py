"""Core's own plugin: its losses, weightings, cache format and feature sources register like anyone else's."""

from __future__ import annotations

from deepspec_core.plugins.hooks import hookimpl
from deepspec_core.plugins.specs import ComponentSpec
from deepspec_core.rows.weighting_options import DecayOptions, DPaceOptions


@hookimpl
def deepspec_losses() -> list[ComponentSpec]:
    """Cross-entropy at the label; distances from the target's distribution; how well the draft knows them."""
    return [
        ComponentSpec(
            name="ce",
            summary="cross-entropy of the draft at the label",
            build="deepspec_core.rows.terms:CrossEntropy",
        ),
        ComponentSpec(
            name="soft_ce",
            summary="cross-entropy of the draft at the target's distribution",
            build="deepspec_core.rows.terms:SoftCrossEntropy",
        ),
        ComponentSpec(
            name="kl",
            summary="Kullback-Leibler divergence of the draft from the target",
            build="deepspec_core.rows.terms:KL",
        ),
        ComponentSpec(
            name="tv",
            summary="total variation between draft and target",
            build="deepspec_core.rows.terms:TotalVariation",
        ),
        ComponentSpec(
            name="lk",
            summary="negative log of the draft's acceptance rate by the target",
            build="deepspec_core.rows.terms:NegativeLogAcceptance",
        ),
        ComponentSpec(
            name="confidence",
            summary="binary cross-entropy of the draft's confidence with its acceptance by the target",
            build="deepspec_core.rows.terms:Confidence",
        ),
    ]


@hookimpl
def deepspec_weightings() -> list[ComponentSpec]:
    """Every row alike, less the later it stands in its block, or by the draft's own confidence."""
    return [
        ComponentSpec(
            name="uniform",
            summary="every row of a block weighs the same",
            build="deepspec_core.rows.weightings:Uniform",
        ),
        ComponentSpec(
            name="decay",
            summary="rows weigh exponentially less the later they stand in their block",
            build="deepspec_core.rows.weightings:Decay",
            options=DecayOptions,
        ),
        ComponentSpec(
            name="d-pace",
            summary="rows weigh by how much they add to the accepted length the draft itself expects",
            build="deepspec_core.rows.weightings:DPace",
            options=DPaceOptions,
        ),
    ]


@hookimpl
def deepspec_cache_formats() -> list[ComponentSpec]:
    """Sealed shards: HDF5, and the published binary layout."""
    return [
        ComponentSpec(
            name="hdf5",
            summary="checksummed HDF5 shards, sealed by rename",
            build="deepspec_core.cache.hdf5:HDF5Format",
        ),
        ComponentSpec(
            name="deepspec-v2",
            summary="the published binary layout, in bfloat16, with checksums beside it",
            build="deepspec_core.cache.binary_v2:BinaryV2Format",
        ),
    ]


@hookimpl
def deepspec_feature_sources() -> list[ComponentSpec]:
    """Features from the run's cache, from the target while training, or from servers of the target."""
    return [
        ComponentSpec(
            name="cached",
            summary="features read from the cache that the cache stage wrote",
            build="deepspec_core.features.cached:from_run",
        ),
        ComponentSpec(
            name="online",
            summary="features computed by the target while training",
            build="deepspec_core.features.online:from_run",
        ),
        ComponentSpec(
            name="server",
            summary="features that serving engines compute elsewhere while training",
            build="deepspec_core.pipeline.feature_servers:from_run",
        ),
    ]
