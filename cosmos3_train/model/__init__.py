"""The doorway to diffusers, transformers and peft: Cosmos 3 as upstream defines it, run on packed streams."""
