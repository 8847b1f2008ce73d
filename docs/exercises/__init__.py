"""Six functions with one mistake each, and the properties that find it."""
