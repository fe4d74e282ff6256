"""What is minimised: `(model, batch) -> Loss`."""
