"""Medusa-1: a vocabulary head for each of the next tokens, on the target's last hidden state."""
