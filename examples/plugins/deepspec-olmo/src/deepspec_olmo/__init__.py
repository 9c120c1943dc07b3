"""The target family OLMo 2 and 3."""
