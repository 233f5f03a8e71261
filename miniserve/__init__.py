"""A minimal, self-contained LLM inference engine focused on decode."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miniserve.core import SamplingParams
    from miniserve.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `import miniserve` alone takes no time; the commands that need no engine start at once.
    module = {"LLM": "miniserve.llm", "SamplingParams": "miniserve.core"}.get(name)
    if module is not None:
        return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
