"""Models larger than one GPU: partitioned over the ranks to score and train, cut by tensors to decode."""
