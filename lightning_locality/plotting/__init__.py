"""Figures of runs: each kind is a function of runs that returns a figure and the numbers in it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
