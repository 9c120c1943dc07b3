"""What counts as a {% generation %} mark of a chat template: a block of it, and nothing that is text to Jinja."""

import pytest
import torch

from deepspec_core.data.conversations import Conversation
from deepspec_core.data.generation_marks import with_signs
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

CONVERSATION = Conversation(
    id="c", messages=({"role": "user", "content": "1+1"}, {"role": "assistant", "content": "the answer"})
)


@pytest.mark.parametrize(
    "text",
    [
        "{#- works with {% generation %} marks -#}",
        "{#\n  {% generation %}{% endgeneration %}\n#}",
        "{% set doc = '{% generation %}' %}",
        "{% raw %}{% generation %}{% endraw %}",
        "{# not closed {% generation %}",
    ],
)
def test_generation_marks_that_are_no_blocks_are_text(text: str) -> None:
    assert with_signs(text) == text
    marked = f"\r\n  {{%- generation %}}\n{{{{ x }}}}{{% endgeneration -%}}\n{text}"
    assert with_signs(marked) == (marked if "not closed" in text else with_signs(marked[: -len(text)]) + text)


def test_marks_in_a_comment_leave_masks_as_they_are() -> None:
    template = str(tiny_tokenizer().chat_template)
    samples = []
    for comment in ("", "{#- {% generation %} {% endgeneration %} -#}"):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = comment + template
        samples += ChatTokenizer(tokenizer).samples(CONVERSATION, tiny_format(), None, 99)
    assert samples[0].loss_mask.any()
    assert torch.equal(samples[0].loss_mask, samples[1].loss_mask)
