"""Package data: the built-in datasets, persona texts and evaluation items."""
