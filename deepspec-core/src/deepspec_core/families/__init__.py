"""The base of target families' adapters, and how any transformers model runs as a target. Names no family."""
