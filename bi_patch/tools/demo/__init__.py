"""The demo: the real engine, stock and armed, on real text, alone and inside batches, compared bitwise."""
