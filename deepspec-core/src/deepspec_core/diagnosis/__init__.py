"""Finds where a draft loses acceptance between training and serving: compares each stage's figures, finds causes."""
