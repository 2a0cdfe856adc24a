"""Updates under DeepSpeed ZeRO."""
