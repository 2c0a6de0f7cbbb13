"""What a program compiled for a TPU slice costs: memory, matrix work, collectives and a timeline."""
