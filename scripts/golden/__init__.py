"""The cases of make_golden.py, a module a layer of the system."""
