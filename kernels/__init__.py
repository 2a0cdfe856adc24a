"""The kernels: one operation a file, its plain-torch reference beside it."""
