"""The engine: data → score → select → train → export → evaluate → report.

Nothing is imported here, so that `slicetune.engine.optim` needs torch alone.
"""
