"""The story that the library exists for: three people, each with their own cat, drawn in one batch."""
