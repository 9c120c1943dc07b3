"""DeepSpec core: contracts, plugins, configuration, data, cache, training, decoding and evaluation of draft models."""

__version__ = "0.1.0"
