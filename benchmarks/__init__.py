"""Side-by-side measurements, one command each; nothing imports this folder."""
