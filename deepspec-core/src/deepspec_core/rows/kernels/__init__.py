"""How the passes over a chunk of logits run: plain formulas, compiled, or in Triton."""
