"""What the example plugins without tests of their own keep: a loss term and a target family."""

import deepspec_hellinger.plugin
import deepspec_olmo.plugin

from deepspec_core.testing import LossSuite, TargetAdapterSuite

WINDOWS = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 3, "sliding_window": 4}


# As the two generations write turns.
TAGS = (
    "<|endoftext|>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{{ '<|endoftext|>' if m.role == 'assistant' }}{{ '\n' if not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TestHellinger(LossSuite):
    component = "hellinger"
    plugin = deepspec_hellinger.plugin


class TestOlmo(TargetAdapterSuite):
    component = "olmo"
    plugin = deepspec_olmo.plugin
    template = TAGS


class TestOlmo3(TestOlmo):
    """The other config class. Most of its layers see 4 positions; a draft is compared with one that sees all."""

    model_type = "olmo3"
    template = CHATML
    sizes = WINDOWS
    full_layer = 3
