"""Drafts that are not trained: how they are named, made and told apart."""
