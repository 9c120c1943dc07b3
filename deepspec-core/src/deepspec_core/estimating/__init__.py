"""What a run will take, before it is started: memory and arithmetic, from its real code on tensors without memory."""
