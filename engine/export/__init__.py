"""What is kept of a training, and the proof that nothing else changed."""
