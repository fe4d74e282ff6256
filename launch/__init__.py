"""How it starts: the mesokurt command, launch scripts and preflight checks."""
