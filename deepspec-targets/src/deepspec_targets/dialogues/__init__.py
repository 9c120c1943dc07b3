"""The dialogues the built-in tiny target was trained on, and prompts like them.

This package knows a small world of exercises (column arithmetic, short stories with numbers, unit conversions,
tables, JSON records, Python functions, small talk) and deals them as endless-looking streams in two splits that
never share a prompt. It needs only the standard library, and knows no tokenizer, no model and no file format.

Every sentence was written for this project; nothing is quoted or derived from other texts.
"""

from deepspec_targets.dialogues.stream import KINDS as KINDS
from deepspec_targets.dialogues.stream import SPLITS as SPLITS
from deepspec_targets.dialogues.stream import answer_of as answer_of
from deepspec_targets.dialogues.stream import check as check
from deepspec_targets.dialogues.stream import dialogues as dialogues
from deepspec_targets.dialogues.stream import prompts as prompts
from deepspec_targets.dialogues.stream import split_of as split_of
