"""What every room stands on: errors, ranks, signals, settings, files."""
