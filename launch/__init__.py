"""Starting training somewhere, and starting it again: what ended, and whether that is worth it."""
