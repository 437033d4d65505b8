"""What knows LLaMA-Factory: its trainer, its loading of data, its launching."""
