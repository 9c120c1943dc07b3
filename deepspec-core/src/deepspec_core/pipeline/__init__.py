"""Runs: the stages of a run file, their results, and what is left to do."""
