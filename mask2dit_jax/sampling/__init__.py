"""From plans to scenes."""
