"""What reads checkpoints, or activations as they come, and says what number formats would do to them."""
