"""slicetune: fine-tunes a few chosen neurons of a large language model. README.md says how.

This file is the package itself, `import slicetune`; its parts are slicetune.engine, slicetune.kernels and
slicetune.recipes. Nothing heavy is imported here.
"""

from .engine.common import __version__

__all__ = ["__version__"]
