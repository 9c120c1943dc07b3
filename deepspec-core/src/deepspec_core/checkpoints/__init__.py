"""Draft checkpoints on disk: finding, writing, reading and inspecting them."""
