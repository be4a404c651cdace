"""Lightning data modules: non-local image tasks and tensor recovery."""

import lazy_loader

# lazy: the processes that generate Pathfinder pictures do without torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
