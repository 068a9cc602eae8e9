"""What rows claim beyond training curves: one module a family, each measured by `rlamort reproduce ROW`."""
