"""Run configurations. A config describes, it does nothing."""
