"""Every setting, every stage."""
