"""CANEFT: neurons that carry information about every domain; RCN, its random control."""

from .settings import Caneft, Rcn

__all__ = ["Caneft", "Rcn"]
