"""The dialogues the built-in tiny target was trained on, and prompts like them.

This package knows a small world of exercises (column arithmetic, short stories with numbers, unit conversions,
tables, JSON records, Python functions, small talk) and deals them as endless-looking streams in two splits that
never share a prompt. It needs only the standard library, and knows no tokenizer, no model and no file format.

Every sentence was written for this project; nothing is quoted or derived from other texts.
"""

from deepspec_targets.dialogues.stream import KINDS, SPLITS, answer_of, check, dialogues, prompts, split_of

__all__ = ["KINDS", "SPLITS", "answer_of", "check", "dialogues", "prompts", "split_of"]
