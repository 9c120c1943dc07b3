"""What the example plugins without tests of their own keep: a loss term and a target family."""

import deepspec_hellinger.plugin
import deepspec_olmo.plugin

from deepspec_core.testing import LossSuite, TargetAdapterSuite

WINDOWS = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 3, "sliding_window": 4}


class TestHellinger(LossSuite):
    component = "hellinger"
    plugin = deepspec_hellinger.plugin


class TestOlmo(TargetAdapterSuite):
    component = "olmo"
    plugin = deepspec_olmo.plugin


class TestOlmo3(TestOlmo):
    """The other config class. Most of its layers see 4 positions; a draft is compared with one that sees all."""

    model_type = "olmo3"
    sizes = WINDOWS
    full_layer = 3
