"""Linear layers of many experts in one launch: rows sorted by expert, each times its own matrix, with adapters."""
