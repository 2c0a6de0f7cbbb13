"""Devices: meshes, shardings, processes and abstract modules."""
