"""The version of transmamba, written here only."""

__version__ = "0.1.0"
