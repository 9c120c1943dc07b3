"""Runs: which stages a run file has, which results exist, what is left to do, and doing it."""
