"""The work: models, training, checkpoints, evaluation. torch is allowed here; nothing is printed."""
