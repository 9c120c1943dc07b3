"""The component that the package offers: one draft type, which is not trained."""

from deepspec_core.plugins import DraftModelSpec, hookimpl
from deepspec_lookup.options import LookupOptions


@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="lookup",
        summary="Prompt lookup: copies what followed an earlier occurrence of the last tokens. Not trained.",
        build="deepspec_lookup.draft:LookupDraft",
        options=LookupOptions,
        trained=False,
    )
