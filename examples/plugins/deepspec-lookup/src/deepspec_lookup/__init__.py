"""Prompt lookup: a draft that copies the tokens that followed an earlier occurrence of the last tokens."""
