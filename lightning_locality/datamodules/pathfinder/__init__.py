"""Pathfinder: are two discs joined by a dashed path?"""

__all__ = ["Pathfinder", "make_pathfinder"]

from lightning_locality.datamodules.pathfinder.module import Pathfinder, make_pathfinder
