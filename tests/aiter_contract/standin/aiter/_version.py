"""Where a built aiter says its version (setuptools_scm writes this file); `aiter.__version__` does not exist."""

from aiter import _standin


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(name)
    return _standin.device.version
