"""How a network learns: the loop, engine, data, optimizers, objectives and checkpoints."""
