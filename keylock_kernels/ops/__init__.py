"""One folder per op: README.md (the maths), reference.py, op.py, api.py."""
