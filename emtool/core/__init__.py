"""Plan and vocabulary: which steps, how much disk, which data. No torch, no printing."""
