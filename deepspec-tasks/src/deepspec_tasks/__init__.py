"""Nine published evaluation tasks for DeepSpec: mathematics, code and chat."""
