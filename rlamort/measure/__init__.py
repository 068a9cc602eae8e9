"""What is measured of agents, solvers and problems, and the claims made of them."""
