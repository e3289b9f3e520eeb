"""burnish makes a language model fit: your task, your hardware, your budget."""

__version__ = "0.1.0"
