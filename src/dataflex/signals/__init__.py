"""What the model makes of the data: losses, embeddings, gradients, generations."""
