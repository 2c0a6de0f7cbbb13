"""Reading, writing and transforming pictures and videos."""
