"""Doors into other people's tools; each module needs the tool it is named after."""
