"""Train convolutional networks that see far, and measure how far any network sees."""

__all__ = ["__version__"]

__version__ = "0.1.0"
