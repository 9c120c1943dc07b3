"""What the package offers: one draft type, which is not trained."""

from deepspec_core.plugins import DraftModelSpec, hookimpl
from deepspec_lookup.options import LookupOptions


@hookimpl
def deepspec_draft_models():
    yield DraftModelSpec(
        name="lookup",
        summary="Prompt lookup: proposes what followed the last tokens before. Not trained.",
        build="deepspec_lookup.draft:LookupDraft",
        options=LookupOptions,
        trained=False,
    )
