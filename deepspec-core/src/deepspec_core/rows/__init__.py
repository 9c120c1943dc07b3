"""The row engine: it turns supervised rows into a loss and its gradients, and never holds the logits of all rows."""
