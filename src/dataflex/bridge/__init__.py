"""The only code that knows LLaMA-Factory."""
