"""The networks, each with its config, its named sizes and its tables, and the registry that finds them."""
