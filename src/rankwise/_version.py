"""The version, on the lowest floor, so that files can name it."""

__version__ = "0.1.0"
