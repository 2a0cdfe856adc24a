"""A folder or a hub id → a checked, loaded model."""
