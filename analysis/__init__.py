"""What is measured: probes, symmetry tests, reproductions of papers and the run report."""
