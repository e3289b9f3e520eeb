"""Data sets, prompt templates, tokenizing and label masks, and the bundled text-to-SQL task. No torch here."""
