"""What every room stands on: errors, ranks, signals, settings, files."""

__version__ = "0.1.0"
