"""The row engine: supervised rows to a loss and its gradients, without holding all their logits at once."""
