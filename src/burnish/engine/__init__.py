"""Generating text: the native engine with its nouns, one file each, and the adapters to other engines."""
