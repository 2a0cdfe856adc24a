"""Lines → scores → pages."""
