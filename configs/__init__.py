"""What to run: one YAML per run, and the typed schema that every YAML is checked against."""
