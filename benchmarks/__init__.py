"""Side-by-side speed: this project, what a user would run instead, and the machine's limits."""
