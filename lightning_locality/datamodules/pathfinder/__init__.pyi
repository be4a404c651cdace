from .module import Pathfinder, make_pathfinder

__all__ = ["Pathfinder", "make_pathfinder"]
