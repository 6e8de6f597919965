"""See README.md beside."""
