"""What a run would take: parameters, memory, steps; nothing is run."""
