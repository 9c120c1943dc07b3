"""A Hellinger-distance loss for DeepSpec drafts."""
