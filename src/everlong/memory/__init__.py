"""Long-term memory: text in, a small LoRA adapter out."""
