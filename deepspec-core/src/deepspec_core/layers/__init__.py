"""What the layers of a draft are built from, whatever its algorithm and family."""
