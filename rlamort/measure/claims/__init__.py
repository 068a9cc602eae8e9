"""Claims of rows beyond training curves: one module per family, each measured by `rlamort reproduce ROW`."""
