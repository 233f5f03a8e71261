"""A minimal, self-contained LLM inference engine focused on decode."""

__version__ = "0.1.0"
