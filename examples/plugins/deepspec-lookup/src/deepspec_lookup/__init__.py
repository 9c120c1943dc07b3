"""Prompt lookup: a draft that copies what followed the same tokens before."""
