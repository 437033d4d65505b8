"""The commands that answer at once: each returns the text to print and imports nothing heavy."""
