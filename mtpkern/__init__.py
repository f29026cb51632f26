"""Several tokens per forward pass for Hugging Face causal language models."""
