"""Target families for DeepSpec, and the tiny target it ships."""
