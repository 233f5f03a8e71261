"""Where a built aiter says its version (setuptools_scm writes this file); `aiter.__version__` does not exist."""

from aiter import _standin

__version__ = _standin.device.version
