"""What a method scores, selects and trains; each method is a dataclass of its settings."""
