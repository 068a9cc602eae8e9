"""Classical solvers, certificates, and models that give both."""
