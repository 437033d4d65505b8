"""What knows the Hugging Face Trainer: the adapter that puts a session into it, and the door for Python users."""
