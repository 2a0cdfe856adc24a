"""Text → sentence pairs → token ids → batches."""
