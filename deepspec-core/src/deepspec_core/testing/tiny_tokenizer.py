"""A tiny byte-level BPE chat tokenizer for tests, trained on a few lines of its own.

Its template behaves like those of real families: an empty think block stands before the last answer but not before
earlier ones, contents are stripped, and the generation prompt ends with an empty think block where thinking is off.
"""

from __future__ import annotations

from typing import Any

from deepspec_core.contracts.target import ConversationFormat

__all__ = ["ASSISTANT_END", "ASSISTANT_START", "TEMPLATE", "tiny_format", "tiny_tokenizer"]

ASSISTANT_START = "<|start|>assistant\n"
"""The text that an answer of the assistant begins after."""

ASSISTANT_END = "<|end|>"
"""The marker that ends an answer; it is one token."""

TEMPLATE = (
    "{%- for m in messages -%}"
    "<|start|>{{ m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{{ m.content.strip() + '<|end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
"""The chat template, in Jinja."""

_TEXT = (
    "What is two plus three? Two plus three is five.",
    "Write a short list: one, two, three and four. The answer to the question is in the text.",
    "The user asks, the assistant answers; then the user asks another question.",
)


def tiny_format() -> ConversationFormat:
    """The conversation format of the template: where answers begin and end."""
    return ConversationFormat(assistant_start=ASSISTANT_START, assistant_ends=(ASSISTANT_END,))


def tiny_tokenizer() -> Any:
    """A transformers fast tokenizer: pad 0, end marker 1, start marker 2, then bytes and a few merges (340 in all)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|pad|>", ASSISTANT_END, "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=ASSISTANT_END, pad_token="<|pad|>", chat_template=TEMPLATE
    )
