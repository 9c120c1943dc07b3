"""What the host halves of drafts share: where blocks are anchored, and which target positions rows look at."""
