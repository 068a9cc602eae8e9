"""A run: a method that is built, trained, saved and resumed."""
