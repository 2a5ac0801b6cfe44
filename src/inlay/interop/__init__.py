"""Adapters of other libraries, read and written."""
