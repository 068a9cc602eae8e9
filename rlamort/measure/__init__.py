"""Measurements of agents, solvers and problems, and the claims about them."""
