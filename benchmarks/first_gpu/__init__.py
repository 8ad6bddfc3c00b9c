"""The first run on a GPU, `make first-gpu`: is everything there, is it right, how fast is it."""
