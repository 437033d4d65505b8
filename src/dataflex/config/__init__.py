"""Configuration: reading, translating and checking it. ``split.resolve`` does all of it."""
