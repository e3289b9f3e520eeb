"""Training: LoRA and full fine-tuning, losses, batches, adapters on disk."""
