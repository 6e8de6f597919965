"""The packing core: lengths in, plan out; then what a packed batch needs to keep its documents apart."""
