"""A run: a method built, trained, saved, resumed."""
