"""Where a draft loses its acceptance between training and serving: the same figures at every stage, and causes."""
