"""Targets: finding them, their tokenizer and their adapter."""
