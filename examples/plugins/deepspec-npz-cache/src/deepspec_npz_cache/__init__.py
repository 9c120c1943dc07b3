"""A feature cache whose shards are NumPy archives."""
