"""The configuration: its dataclasses, and YAML with overrides."""
