"""The eight stages, one file each, and what they stand on: the store, identity, and the tables between them."""
