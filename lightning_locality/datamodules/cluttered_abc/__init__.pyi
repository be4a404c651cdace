from .module import ClutteredABC, make_cluttered_abc

__all__ = ["ClutteredABC", "make_cluttered_abc"]
