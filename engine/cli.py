"""The command line of every recipe."""

from .run.cli import main

__all__ = ["main"]
