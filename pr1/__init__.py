"""A lean, custom-kernel GRPO trainer for visual perception."""
