"""tandem: from a base language model to an aligned chat model, in two stages."""

__version__ = "0.1.0"
