"""Classical solvers, certificates, and solvers that combine a model with both."""
