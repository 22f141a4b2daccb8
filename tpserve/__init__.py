"""tpserve: a server for large language models that starts with nothing but `torchrun`.

Importing this package imports nothing else: the HTTP frontend must never drag torch in.
"""

from tpserve.version import __version__

__all__ = ["__version__"]
