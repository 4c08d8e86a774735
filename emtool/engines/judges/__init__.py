"""What scores answers: a model behind a server, or one in this process."""
