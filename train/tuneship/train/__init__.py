"""From data to artifacts: read and mask rows, train a LoRA adapter on a quantized base, merge it, prove parity."""
