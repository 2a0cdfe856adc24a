"""A model whose blocks hold their linear layers in 4 or 8 bits: how it is loaded, and what its layers compute."""
