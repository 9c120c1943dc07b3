"""The parts of a draft's layers, for every algorithm and family."""
