"""Stories: files, plans and what is left of them on disk."""
