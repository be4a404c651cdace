"""Cluttered ABC: do two markers lie on the same letter?"""

import lazy_loader

# lazy: the processes that generate pictures do without torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
