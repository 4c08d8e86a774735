"""What answers questions: a model in this process, a server, or a script."""
