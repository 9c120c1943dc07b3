"""Runs: which stages a run file has, what stands already, what is to be done, and doing it."""
