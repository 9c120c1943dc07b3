"""What the example plugins without tests of their own keep: a loss term and a target family."""

import deepspec_hellinger.plugin
import deepspec_olmo.plugin

from deepspec_core.testing import LossSuite, TargetAdapterSuite


class TestHellinger(LossSuite):
    component = "hellinger"
    plugin = deepspec_hellinger.plugin


class TestOlmo(TargetAdapterSuite):
    component = "olmo"
    plugin = deepspec_olmo.plugin
