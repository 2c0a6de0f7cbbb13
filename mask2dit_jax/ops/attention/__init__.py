"""Joint text-video attention under the paper's masks. api.attend is the entry point."""
